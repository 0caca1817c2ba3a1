"""Pictures decoded and resized fast: from bytes to the pixels a model wants to see, for whole data sets.

Resizing costs Pillow more than decoding. `read_picture` does the same arithmetic by `clipkit.resample`, on
the decoder's own buffer, and decodes plain JPEGs with simplejpeg. Nothing else changes: the checks are those
of `clipkit.encoded`, the geometry is `Preprocess.fit`, whatever simplejpeg does not decode exactly as Pillow
goes to Pillow, and the pixels are those of
`preprocess.uint8(decode_image(data, min_side=preprocess.min_side))`.

Pictures of more than a megapixel go through torch's antialiased uint8 kernel, which is faster the larger
they are: its weights have 16 bits where Pillow's have 22, so that single values are a level off.

Shapes: H height, W width, S model's picture size; C is 3, or 4 with a byte of no meaning after the colours.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipkit.encoded import MAX_BYTES, MAX_PIXELS, open_image, orientation, shrink
from clipkit.errors import InputError
from clipkit.images import Box, Preprocess, load_image

log = logging.getLogger("clipkit")

Crop = tuple[float, float, float, float]
"""A box in shares of a picture's width and height: left, top, width, height."""
CropOf = Callable[[int, int], Crop]
"""From a picture's width and height in pixels to the box to cut out."""

_JPEG = ("JPEG", "MPO")  # the second is several in one file
_EXACT = 1 << 20  # pixels of the largest picture that is resized as Pillow does it, to the bit


def read_picture(
    data: bytes,
    preprocess: Preprocess,
    *,
    name: str = "image",
    crop: Crop | CropOf | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """An encoded picture as a model wants to see it, not normalised.

    Args:
        data: The bytes of a JPEG, PNG, WebP, BMP or GIF file.
        preprocess: The model's.
        name: What to call the picture in messages.
        crop: A box in shares of the upright picture's width and height, each in [0, 1], or what gives it for
            a width and height in pixels. It is rounded to whole pixels, cut out and squashed to S × S, as
            `RandomResizedCrop` does. None: the picture as `preprocess.uint8` resizes and cuts it.
        max_pixels: Largest width × height, checked before decoding.
        max_bytes: Largest encoded size.

    Returns:
        uint8 (3, S, S), contiguous.

    Raises:
        ImageError: As `decode_image`: empty, too large, in another format, damaged or cut off.
        InputError: `crop` is empty or leaves the picture.
    """
    image = open_image(data, max_pixels=max_pixels, max_bytes=max_bytes, name=name)
    if image.format in _JPEG:
        width, height = image.size
        chosen = _chosen(crop, *((height, width) if orientation(image) >= 5 else (width, height)), name)
        pixels_HWC = _decode_jpeg(image, data, _min_side(preprocess, image, chosen), name)
        return fit_pixels(pixels_HWC, preprocess, name=name, crop=chosen)
    return fit_pixels(_pixels(load_image(image, name)), preprocess, name=name, crop=crop)


def fit_pixels(
    pixels_HWC: np.ndarray,
    preprocess: Preprocess,
    *,
    name: str = "image",
    crop: Crop | CropOf | None = None,
) -> Tensor:
    """Decoded pixels as `read_picture` gives a picture's.

    Args:
        pixels_HWC: uint8 (H, W, C), the upright picture.
        preprocess, name, crop: As for `read_picture`.

    Returns:
        uint8 (3, S, S), contiguous.

    Raises:
        InputError: `crop` is empty or leaves the picture.
    """
    height, width, side = *pixels_HWC.shape[:2], preprocess.size
    chosen = _chosen(crop, width, height, name)
    if chosen is None:
        box, size, (x, y) = preprocess.fit(width, height)
    else:
        box, size, (x, y) = _pixel_box(chosen, width, height), (side, side), (0, 0)
    left, top, right, bottom = box
    resize = _resize_exactly if height * width <= _EXACT else _resize
    resized_3hw = resize(pixels_HWC[top:bottom, left:right], size, preprocess.interpolation)
    return resized_3hw[:, y : y + side, x : x + side].contiguous()


def decoder() -> str:
    """The libraries whose versions decide the pixels of `read_picture`, for fingerprints and reports.

    JPEGs come from the first named. Other versions give the same pictures; single pixels may differ by a
    level.
    """
    names = ["pillow", "torch"] if _simplejpeg() is None else ["simplejpeg", "pillow", "torch"]
    return ", ".join(f"{name} {version(name)}" for name in names)


@cache
def _simplejpeg() -> Callable[..., np.ndarray] | None:
    """simplejpeg's decoder; None where it is not installed or does not load, which is said once."""
    try:
        return import_module("simplejpeg").decode_jpeg
    except ImportError as error:
        why = "not installed" if isinstance(error, ModuleNotFoundError) else f"unusable: {error}"
        log.warning("simplejpeg is %s; Pillow decodes JPEGs instead, more slowly", why)
        return None


def _decode_jpeg(image: Image.Image, data: bytes, min_side: float | None, name: str) -> np.ndarray:
    """The upright pixels of an opened JPEG, uint8 (H, W, C). Raises: ImageError."""
    full = image.size
    if min_side is not None:
        shrink(image, min_side)
    # Scaled, turned and CMYK pictures are Pillow's.
    plain = image.size == full and image.mode in ("L", "RGB") and orientation(image) == 1
    if plain and image.format == "JPEG" and (decode_jpeg := _simplejpeg()) is not None:
        try:
            return decode_jpeg(data, _layout(*full))
        except ValueError:
            pass  # damaged, or of a kind that it does not know: Pillow's word counts
    return _pixels(load_image(image, name))


def _pixels(image: Image.Image) -> np.ndarray:
    """An RGB picture's pixels as uint8 (H, W, C)."""
    if (layout := _layout(*image.size)) == "RGB":
        return np.array(image)
    return np.frombuffer(image.tobytes("raw", layout), np.uint8).reshape(image.height, image.width, 4)


def _layout(width: int, height: int) -> str:
    """How the kernel that resizes such a picture wants its bytes."""
    return "RGBX" if width * height <= _EXACT else "RGB"


def _resize_exactly(pixels_HWC: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """A picture scaled to `size` (width, height) with antialiasing, as Pillow does it: uint8 (3, h, w)."""
    from clipkit.resample import resize  # half a second

    if pixels_HWC.shape[2] == 3:
        pixels_HWC = np.pad(pixels_HWC, ((0, 0), (0, 0), (0, 1)))
    return torch.from_numpy(resize(pixels_HWC, size, interpolation))


def _resize(pixels_HWC: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """The same by torch, within a level or, once in millions of values, two."""
    # torch's kernel is several times as fast where a pixel's channels lie side by side
    pixels_13HW = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)[None]
    (height, width), (new_width, new_height) = pixels_13HW.shape[2:], size
    # The kernel scales rows first. Pillow 13 scales columns first where that leaves its second pass much less
    # to do, and both clip what overshoots between the passes, so that the order shows at sharp edges.
    if height - new_height > max(0, 2 * (width - new_width)):
        pixels_13HW = F.interpolate(pixels_13HW, (new_height, width), mode=interpolation, antialias=True)
    return F.interpolate(pixels_13HW, (new_height, new_width), mode=interpolation, antialias=True)[0]


def _min_side(preprocess: Preprocess, image: Image.Image, crop: Crop | None) -> float | None:
    """The short side that DCT scaling must leave, so that what is cut out keeps `preprocess.min_side`."""
    if preprocess.min_side is None or crop is None:
        return preprocess.min_side
    (width, height), (_, _, wide, high) = image.size, crop
    if orientation(image) >= 5:
        wide, high = high, wide
    return preprocess.min_side * min(width, height) / min(width * wide, height * high)


def _chosen(crop: Crop | CropOf | None, width: int, height: int, name: str) -> Crop | None:
    """The box for a picture of this size. Raises: InputError where it is none."""
    found = crop(width, height) if callable(crop) else crop
    if found is not None:
        left, top, wide, high = found
        fits = left >= 0 and top >= 0 and left + wide <= 1 + 1e-6 and top + high <= 1 + 1e-6
        if not (fits and wide > 0 and high > 0):  # so that NaN is refused too
            raise InputError(f"{name}: the crop {found} is no box inside [0, 1] × [0, 1]")
    return found


def _pixel_box(crop: Crop, width: int, height: int) -> Box:
    """Shares as whole pixels, at least one in each direction."""
    left, top = min(round(crop[0] * width), width - 1), min(round(crop[1] * height), height - 1)
    right, bottom = round((crop[0] + crop[2]) * width), round((crop[1] + crop[3]) * height)
    return left, top, min(max(right, left + 1), width), min(max(bottom, top + 1), height)
