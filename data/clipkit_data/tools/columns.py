"""What can be said of a sample without decoding its picture: size, format, length of the caption, digests.

One row of these columns per sample is what `clipkit shards stats` counts and `clipkit shards filter` decides
by. Width and height come from the picture's header, as a viewer shows it (EXIF orientation applied), not from
the `.json`: that may tell of the original before it was scaled down.
"""

import hashlib
from dataclasses import dataclass

from clipkit.encoded import open_image, orientation
from clipkit.errors import ImageError
from clipkit_data.records import Record, RecordError
from clipkit_data.shards.scan import picture_reason

Digest = bytes
"""16 bytes: equal for equal data."""


@dataclass(frozen=True, slots=True)
class Columns:
    """One sample's columns; `aspect` is the longer side divided by the shorter, at least 1."""

    key: str
    caption: str
    words: int
    characters: int
    bytes: int
    format: str
    width: int
    height: int
    aspect: float
    picture: Digest
    """Digest of the picture's bytes."""


def columns_of(record: Record) -> Columns:
    """The columns of a record. Raises: RecordError when the picture's header cannot be read."""
    try:
        image = open_image(record.image, name=record.key)
    except ImageError as error:
        raise RecordError(error.message, picture_reason(error)) from error
    width, height = image.size
    if "exif" in image.info and orientation(image) >= 5:  # without this a PNG would be decoded to look for it
        width, height = height, width
    caption = record.caption or ""
    return Columns(
        key=record.key,
        caption=caption,
        words=len(caption.split()),
        characters=len(caption),
        bytes=len(record.image),
        format=image.format or "",
        width=width,
        height=height,
        aspect=max(width, height) / min(width, height),
        picture=digest(record.image),
    )


def digest(data: bytes) -> Digest:
    """A digest of 16 bytes: two different ones of a billion are equal with a chance of 10⁻²¹."""
    return hashlib.blake2b(data, digest_size=16).digest()
