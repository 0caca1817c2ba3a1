"""Pictures: from untrusted bytes to one fixed-size tensor.

`decode_image` is the one door through which a picture enters: the checks of `clipkit.encoded`, a full decode,
and an upright RGB picture at the end or an `ImageError` that says why not. `Preprocess` is what a model wants
to see (size, resize rule, mean, standard deviation); it is part of the model, since other pixels give other
embeddings. Resizing is Pillow's, as in the models' own training, and stays uint8; the normalisation to float
runs wherever the model runs. `clipkit.decode` is the fast way from bytes to the same pixels.

Shapes: N pictures, H height, W width, S model's picture size.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from annotated_types import Gt
from PIL import Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor

from clipkit.config import Config
from clipkit.encoded import MAX_BYTES, MAX_PIXELS, check_bytes, check_pixels, open_image, orientation, shrink
from clipkit.errors import ImageError, InputError, NotFoundError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# A picture longer than this many times its short side is cut to that before it is scaled: the centre crop
# drops the rest anyway, and scaling a 1 × 16,000,000 strip to 224 rows would need terabytes.
_MAX_ASPECT = 16

ImageInput = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray
Interpolation = Literal["bicubic", "bilinear"]
JpegScale = Literal["full", "2x", "1x"]
Channels = tuple[float, float, float]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, as Pillow has it


def decode_image(
    data: ImageInput,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    name: str = "image",
    alpha: bool = False,
    min_side: int | None = None,
) -> Image.Image:
    """An upright RGB picture, fully decoded.

    The first frame of an animation is taken, the EXIF orientation applied, 16-bit grey scaled to 8 bits,
    and transparency laid over white.

    Args:
        data: The bytes of a JPEG, PNG, WebP, BMP or GIF file; a path to one; a Pillow picture; or a uint8
            array (H, W, 3).
        max_pixels: Largest width × height, checked before decoding.
        max_bytes: Largest encoded size.
        name: What to call the picture in messages.
        alpha: Keep transparency where there is any; `over_white` lays such a picture over white.
        min_side: `Preprocess.min_side` of the model that will see the picture: an encoded JPEG is decoded
            at the smallest of 1/1, 1/2, 1/4, 1/8 that leaves its short side this many pixels.

    Returns:
        A Pillow picture of mode RGB; with `alpha`, RGBA where the picture has transparency.

    Raises:
        ImageError: With `reason` "empty", "too_large" (bytes or pixels), "format" (none of the five, or an
            array of another shape or type) or "undecodable" (damaged or truncated).
        NotFoundError: `data` is a path and no file is there.
    """
    if isinstance(data, Image.Image):
        check_pixels(data.size, max_pixels, name)
        return load_image(data, name, alpha=alpha)
    if isinstance(data, np.ndarray):
        return _from_array(data, max_pixels, name)
    if isinstance(data, str | Path):
        name = str(data) if name == "image" else name
        data = _read(Path(data), max_bytes, name)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"{name}: expected bytes, a path, a picture or an array, got {type(data).__name__}")
    image = open_image(data, max_pixels=max_pixels, max_bytes=max_bytes, name=name)
    if min_side is not None:
        shrink(image, min_side)
    return load_image(image, name, alpha=alpha)


def _read(path: Path, max_bytes: int, name: str) -> bytes:
    """The bytes of a file, whose size is checked before it is read."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    check_bytes(path.stat().st_size, max_bytes, name)
    return path.read_bytes()


def _from_array(array: np.ndarray, max_pixels: int, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name}: an array must be uint8 of shape (H, W, 3), got {array.dtype} {array.shape}", "format"
        )
    if array.size == 0:
        raise ImageError(f"{name} is empty: its shape is {array.shape}", "empty")
    check_pixels((array.shape[1], array.shape[0]), max_pixels, name)
    return Image.fromarray(np.ascontiguousarray(array))


def load_image(image: Image.Image, name: str = "image", *, alpha: bool = False) -> Image.Image:
    """Every pixel of the first frame as upright RGB, or RGBA if `alpha` and there is any.

    Raises:
        ImageError: The picture is damaged or cut off ("undecodable").
    """
    try:
        image.load()
        upright = _upright(image)
        if upright.mode.startswith("I"):
            return Image.fromarray(_grey16_to_8(np.asarray(upright))).convert("RGB")
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            return rgba if alpha else over_white(rgba)
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except Exception as error:  # a decoder's failure of any kind means the same to the sender
        raise ImageError(f"{name} cannot be decoded: {error}", "undecodable") from error


def over_white(image: Image.Image) -> Image.Image:
    """A picture as RGB: what is transparent shows white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; unreadable EXIF is no reason to refuse pixels."""
    try:
        return image if orientation(image) == 1 else ImageOps.exif_transpose(image)
    except Exception:  # it writes the EXIF anew, and fails on what it cannot write
        return image


def _grey16_to_8(grey_HW: np.ndarray) -> np.ndarray:
    """16-bit grey levels as 8 bits: Pillow's own conversion clips at 255 instead of scaling."""
    return (np.clip(grey_HW.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)


class Fit(NamedTuple):
    """How one picture becomes S × S: cut `box` out, scale it to `size`, cut S × S out at `corner`."""

    box: Box
    size: tuple[int, int]  # width, height
    corner: tuple[int, int]  # left, top


class Preprocess(Config):
    """What a model wants to see: picture size, resize rule and normalisation.

        normalised = (pixel / 255 − mean) / std

    Args:
        size: Side S of the square that the model takes, in pixels.
        mean, std: Per channel (red, green, blue), of pixel values in [0, 1].
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        resize: "shortest" scales the short side and cuts the centre out; "squash" scales both sides to S.
        resize_size: With "shortest", the length to which the short side is scaled (default: `size`).
        jpeg_scale: "full" decodes JPEGs whole. "2x" and "1x" decode them at the smallest DCT scale that
            leaves the short side twice or once the length to which it is scaled: faster for large pictures,
            and slightly other pixels.
    """

    size: Annotated[int, Field(ge=1, le=4096)] = 224
    mean: Channels = CLIP_MEAN
    std: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    resize_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    # left out where it changes nothing: fingerprints of models from before it was there stay as they are
    jpeg_scale: Annotated[JpegScale, Field(exclude_if=lambda scale: scale == "full")] = "full"

    @model_validator(mode="after")
    def _resize_size_fits(self) -> Self:
        if self.resize_size is not None and (self.resize == "squash" or self.resize_size < self.size):
            raise ValueError('resize_size needs resize "shortest" and at least the length of size')
        return self

    @property
    def min_side(self) -> int | None:
        """The length in pixels that decoding must leave a JPEG's short side; None decodes it whole."""
        times = {"full": 0, "2x": 2, "1x": 1}[self.jpeg_scale]
        return times * (self.resize_size or self.size) or None

    def fit(self, width: int, height: int) -> Fit:
        """How an upright picture of that size becomes S × S."""
        whole, side = (0, 0, width, height), self.size
        if self.resize == "squash":
            return Fit(whole, (side, side), (0, 0))
        box = _without_ends(width, height)
        width, height = box[2] - box[0], box[3] - box[1]
        target, short = self.resize_size or side, min(width, height)
        size = (_scaled(width, short, target), _scaled(height, short, target))
        return Fit(box, size, (round((size[0] - side) / 2), round((size[1] - side) / 2)))

    def uint8(self, image: Image.Image) -> Tensor:
        """One RGB picture as uint8 (3, S, S): resized and cropped, not normalised."""
        (box, size, (left, top)), side = self.fit(*image.size), self.size
        part = image if box == (0, 0, *image.size) else image.crop(box)
        resized = part.resize(size, Image.Resampling[self.interpolation.upper()])
        return pixels(resized.crop((left, top, left + side, top + side))).contiguous()

    def normalize(self, pixels_NCSS: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) as normalised float32 (N, 3, S, S), on the same device."""
        mean, std = self.statistics(pixels_NCSS.device)
        return (pixels_NCSS.to(torch.float32) / 255 - mean) / std

    def statistics(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as float32 (3, 1, 1)."""
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return torch.tensor(self.mean, **kind).view(3, 1, 1), torch.tensor(self.std, **kind).view(3, 1, 1)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        """RGB pictures as one normalised float32 batch (N, 3, S, S)."""
        if not images:
            return torch.empty(0, 3, self.size, self.size)
        return self.normalize(torch.stack([self.uint8(image) for image in images]))


def pixels(image: Image.Image) -> Tensor:
    """A copy of an RGB picture's pixels as uint8 (3, H, W), the channels innermost in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _scaled(length: int, short: int, target: int) -> int:
    return target if length == short else int(target * length / short)


def _without_ends(width: int, height: int) -> Box:
    """The middle of a very long picture; see `_MAX_ASPECT`."""
    most = min(width, height) * _MAX_ASPECT
    wide, high = min(width, most), min(height, most)
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
