"""Pictures: from untrusted bytes to one fixed-size tensor.

`decode_image` is the one door through which a picture enters: a short list of formats, limits that are
checked before any pixel is decoded, a full decode, and an upright RGB picture at the end or an `ImageError`
that says why not. `Preprocess` is what a model wants to see (size, resize rule, mean, standard deviation);
it is part of the model, since other pixels give other embeddings. Resizing is Pillow's, as in the models' own
training, and stays uint8; the normalisation to float runs wherever the model runs.

Shapes: N pictures, H height, W width, S model's picture size.
"""

from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from annotated_types import Gt
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, model_validator
from torch import Tensor

from clipkit.config import Config
from clipkit.errors import ImageError, InputError, NotFoundError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000  # the largest phone cameras; 192 MB decoded. A service should set less

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# First bytes of the accepted formats, and of others that people try: a good message names what it found.
_ACCEPTED = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF8")
_REFUSED = (
    (0, b"II*\x00", "a TIFF picture"),
    (0, b"MM\x00*", "a TIFF picture"),
    (4, b"ftypheic", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (0, b"%PDF", "a PDF document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML document"),
    (0, b"<!DOCTYPE", "an HTML page"),
    (0, b"<html", "an HTML page"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%!PS", "a PostScript document"),
)

# A picture longer than this many times its short side is cut to that before it is scaled: the centre crop
# drops the rest anyway, and scaling a 1 × 16,000,000 strip to 224 rows would need terabytes.
_MAX_ASPECT = 16

_ORIENTATION = 0x0112

ImageInput = bytes | bytearray | memoryview | str | Path | Image.Image | np.ndarray
Interpolation = Literal["bicubic", "bilinear"]
Channels = tuple[float, float, float]


def decode_image(
    data: ImageInput,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    name: str = "image",
    alpha: bool = False,
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

    Returns:
        A Pillow picture of mode RGB; with `alpha`, RGBA where the picture has transparency.

    Raises:
        ImageError: With `reason` "empty", "too_large" (bytes or pixels), "format" (none of the five, or an
            array of another shape or type) or "undecodable" (damaged or truncated).
        NotFoundError: `data` is a path and no file is there.
    """
    if isinstance(data, Image.Image):
        _check_pixels(data.size, max_pixels, name)
        return _decoded(data, name, alpha)
    if isinstance(data, np.ndarray):
        return _from_array(data, max_pixels, name)
    if isinstance(data, str | Path):
        name = str(data) if name == "image" else name
        data = _read(Path(data), max_bytes, name)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InputError(f"{name}: expected bytes, a path, a picture or an array, got {type(data).__name__}")
    if len(data) == 0:
        raise ImageError(f"{name} is empty (0 bytes)", "empty")
    if len(data) > max_bytes:
        raise ImageError(f"{name} has {len(data):,} bytes; at most {max_bytes:,} are accepted", "too_large")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels", "too_large") from error
    except UnidentifiedImageError as error:
        raise _unidentified(bytes(data[:16]), name) from error
    except Exception as error:  # Pillow's parsers raise many kinds on hostile headers
        raise ImageError(f"{name} cannot be decoded: {error}", "undecodable") from error
    _check_pixels(image.size, max_pixels, name)
    return _decoded(image, name, alpha)


def _read(path: Path, max_bytes: int, name: str) -> bytes:
    """The bytes of a file, whose size is checked before it is read."""
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    size = path.stat().st_size
    if size > max_bytes:
        raise ImageError(f"{name} has {size:,} bytes; at most {max_bytes:,} are accepted", "too_large")
    return path.read_bytes()


def _check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width} × {height} pixels; at most {max_pixels:,} pixels are accepted",
            "too_large",
            hint="scale it down first",
        )


def _unidentified(head: bytes, name: str) -> ImageError:
    """Why Pillow knew none of the five formats in these first bytes."""
    if head.startswith(_ACCEPTED):
        return ImageError(f"{name} cannot be decoded: its header is damaged or cut off", "undecodable")
    for offset, magic, what in _REFUSED:
        if head[offset:].lower().startswith(magic.lower()):
            return ImageError(f"{name} is {what}; accepted are {', '.join(FORMATS)}", "format")
    return ImageError(f"{name} is no picture in a format that is accepted: {', '.join(FORMATS)}", "format")


def _from_array(array: np.ndarray, max_pixels: int, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(
            f"{name}: an array must be uint8 of shape (H, W, 3), got {array.dtype} {array.shape}", "format"
        )
    if array.size == 0:
        raise ImageError(f"{name} is empty: its shape is {array.shape}", "empty")
    _check_pixels((array.shape[1], array.shape[0]), max_pixels, name)
    return Image.fromarray(np.ascontiguousarray(array))


def _decoded(image: Image.Image, name: str, alpha: bool) -> Image.Image:
    """Decode every pixel of the first frame and bring it to upright RGB, or RGBA if that is wanted."""
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
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # the EXIF parser fails in as many ways as there are broken cameras
        return image


def _grey16_to_8(grey_HW: np.ndarray) -> np.ndarray:
    """16-bit grey levels as 8 bits: Pillow's own conversion clips at 255 instead of scaling."""
    return (np.clip(grey_HW.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)


class Preprocess(Config):
    """What a model wants to see: picture size, resize rule and normalisation.

        normalised = (pixel / 255 − mean) / std

    Args:
        size: Side S of the square that the model takes, in pixels.
        mean, std: Per channel (red, green, blue), of pixel values in [0, 1].
        interpolation: "bicubic" or "bilinear", always with antialiasing.
        resize: "shortest" scales the short side and cuts the centre out; "squash" scales both sides to S.
        resize_size: With "shortest", the length to which the short side is scaled (default: `size`).
    """

    size: Annotated[int, Field(ge=1, le=4096)] = 224
    mean: Channels = CLIP_MEAN
    std: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize: Literal["shortest", "squash"] = "shortest"
    resize_size: Annotated[int, Field(ge=1, le=4096)] | None = None

    @model_validator(mode="after")
    def _resize_size_fits(self) -> Self:
        if self.resize_size is not None and (self.resize == "squash" or self.resize_size < self.size):
            raise ValueError('resize_size needs resize "shortest" and at least the length of size')
        return self

    def uint8(self, image: Image.Image) -> Tensor:
        """One RGB picture as uint8 (3, S, S): resized and cropped, not normalised."""
        filter_ = Image.Resampling[self.interpolation.upper()]
        side = self.size
        if self.resize == "squash":
            return _tensor(image.resize((side, side), filter_))
        image = _without_ends(image)
        target, short = self.resize_size or side, min(image.size)
        width, height = (target if length == short else int(target * length / short) for length in image.size)
        resized = image.resize((width, height), filter_)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return _tensor(resized.crop((left, top, left + side, top + side)))

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


def _tensor(image: Image.Image) -> Tensor:
    """A picture's pixels as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _without_ends(image: Image.Image) -> Image.Image:
    """A very long picture cut to its middle; see `_MAX_ASPECT`."""
    short, long = min(image.size), max(image.size)
    if long <= short * _MAX_ASPECT:
        return image
    width, height = (min(side, short * _MAX_ASPECT) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
