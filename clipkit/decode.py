"""Pictures decoded and resized fast: from bytes to the pixels a model wants to see, for whole data sets.

Resizing costs Pillow more than decoding. `read_picture` does the same arithmetic with torch's antialiased
uint8 kernel, on the decoder's own buffer, and decodes plain JPEGs with simplejpeg. Nothing else changes: the
checks are those of `clipkit.encoded`, the geometry is `Preprocess.fit`, whatever simplejpeg does not decode
exactly as Pillow goes to Pillow, and the pixels are within 1 level of
`preprocess.uint8(decode_image(data, min_side=preprocess.min_side))` (2 at about one in a million).

Shapes: H height, W width, S model's picture size.
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
from clipkit.images import Box, Preprocess, load_image, pixels

log = logging.getLogger("clipkit")

Crop = tuple[float, float, float, float]
"""A box in shares of a picture's width and height: left, top, width, height."""
CropOf = Callable[[int, int], Crop]
"""From a picture's width and height in pixels to the box to cut out."""

_JPEG = ("JPEG", "MPO")  # the second is several in one file


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
        pixels_3HW = _decode_jpeg(image, data, _min_side(preprocess, image, chosen), name)
    else:
        pixels_3HW = pixels(load_image(image, name))
        chosen = _chosen(crop, pixels_3HW.shape[2], pixels_3HW.shape[1], name)
    height, width = pixels_3HW.shape[1:]
    side = preprocess.size
    if chosen is None:
        box, size, corner = preprocess.fit(width, height)
    else:
        box, size, corner = _pixel_box(chosen, width, height), (side, side), (0, 0)
    left, top, right, bottom = box
    resized_3HW = _resize(pixels_3HW[:, top:bottom, left:right], size, preprocess.interpolation)
    left, top = corner
    return resized_3HW[:, top : top + side, left : left + side].contiguous()


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


def _decode_jpeg(image: Image.Image, data: bytes, min_side: float | None, name: str) -> Tensor:
    """The upright pixels of an opened JPEG, uint8 (3, H, W). Raises: ImageError."""
    full = image.size
    if min_side is not None:
        shrink(image, min_side)
    # Scaled, turned and CMYK pictures are Pillow's.
    plain = image.size == full and image.mode in ("L", "RGB") and orientation(image) == 1
    if plain and image.format == "JPEG" and (decode_jpeg := _simplejpeg()) is not None:
        try:
            return torch.from_numpy(decode_jpeg(data, "RGB")).permute(2, 0, 1)
        except ValueError:
            pass  # damaged, or of a kind that it does not know: Pillow's word counts
    return pixels(load_image(image, name))


def _resize(pixels_3HW: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """A picture scaled to `size` (width, height) with antialiasing, still uint8."""
    # torch's kernel is several times as fast where a pixel's channels lie side by side
    pixels_13HW = pixels_3HW[None].contiguous(memory_format=torch.channels_last)
    (height, width), (new_width, new_height) = pixels_3HW.shape[1:], size
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
