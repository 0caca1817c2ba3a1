"""Encoded pictures: the header read, the limits checked, and not one pixel decoded yet.

Bytes come from strangers. Everything that can be refused without decoding is refused here: nothing at all,
too many bytes, a format that is not on the short list, a header that promises too many pixels. What comes out
is a Pillow picture that still holds only its header, from which any decoder can go on.
"""

import math
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from clipkit.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_BYTES = 100_000_000
MAX_PIXELS = 64_000_000  # the largest phone cameras; 192 MB decoded. A service should set less

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

_ORIENTATION = 0x0112


def open_image(
    data: bytes | bytearray | memoryview,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    name: str = "image",
) -> Image.Image:
    """A picture of which the header alone is read.

    Args:
        data: The bytes of a file in one of `FORMATS`.
        max_pixels: Largest width × height.
        max_bytes: Largest encoded size.
        name: What to call the picture in messages.

    Returns:
        A lazy Pillow picture; `clipkit.images.load_image` decodes it.

    Raises:
        ImageError: With `reason` "empty", "too_large" (bytes or pixels), "format" (none of the five) or
            "undecodable" (the header is damaged or cut off).
    """
    if len(data) == 0:
        raise ImageError(f"{name} is empty (0 bytes)", "empty")
    check_bytes(len(data), max_bytes, name)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has more than {max_pixels:,} pixels", "too_large") from error
    except UnidentifiedImageError as error:
        raise _unidentified(bytes(data[:16]), name) from error
    except Exception as error:  # Pillow's parsers raise many kinds on hostile headers
        raise ImageError(f"{name} cannot be decoded: {error}", "undecodable") from error
    check_pixels(image.size, max_pixels, name)
    return image


def shrink(image: Image.Image, min_side: float) -> None:
    """Have a lazy JPEG decoded at the smallest DCT scale that leaves its short side `min_side` pixels.

    The scales are 1/1, 1/2, 1/4 and 1/8. The decoder leaves out the high frequencies of each block of 8 × 8
    pixels, which costs a fraction of decoding them and scaling them away. `image.size` is the scaled size
    from then on. Other formats stay.
    """
    image.draft(None, (math.ceil(min_side), math.ceil(min_side)))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; from 5 on width and height change places.

    Returns:
        1 too where there is none, or none that can be read.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
        return value if value in range(1, 9) else 1
    except Exception:  # the EXIF parser fails in as many ways as there are broken cameras
        return 1


def check_bytes(size: int, max_bytes: int, name: str) -> None:
    """Refuse too large a file. Raises: ImageError "too_large"."""
    if size > max_bytes:
        raise ImageError(f"{name} has {size:,} bytes; at most {max_bytes:,} are accepted", "too_large")


def check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Refuse too large a picture. Raises: ImageError "too_large"."""
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
