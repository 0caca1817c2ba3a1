"""What can be said of a sample without decoding its picture: size, format, length of the caption, digests.

One row of these columns per sample is what `clipkit shards stats` counts and `clipkit shards filter` decides
by. Width and height come from the picture's header, as a viewer shows it (EXIF orientation applied), not from
the `.json`: that may tell of the original before it was scaled down. A video, a graph and a text have none of
what a header says; as in `clipkit shards check`, that is no fault.
"""

import hashlib
from dataclasses import dataclass

from PIL import Image

from clipkit.encoded import open_image, orientation
from clipkit.errors import ImageError
from clipkit_data.records import Record, RecordError
from clipkit_data.shards.sample import is_picture
from clipkit_data.shards.scan import picture_reason

Digest = bytes
"""16 bytes: equal for equal data."""


@dataclass(frozen=True, slots=True)
class Columns:
    """One sample's columns; `aspect` is the longer side divided by the shorter, at least 1.

    `format` and all after it but `picture` are those of the picture, or of a clip's first frame; None of a
    video, a graph or a text.
    """

    key: str
    caption: str
    words: int
    characters: int
    bytes: int | None
    """Size of the picture, of all frames together, of the video or the graph; None of a text."""
    format: str | None
    width: int | None
    height: int | None
    aspect: float | None
    picture: Digest | None
    """Digest of those bytes; None of a text."""


def columns_of(record: Record) -> Columns:
    """The columns of a record. Raises: RecordError when the header of a picture or frame cannot be read."""
    contents = record.frames or ((record.image,) if record.extension else ())
    pictured = bool(record.frames) or is_picture(record.extension)
    images = [_opened(data, record.key) for data in contents] if pictured else []
    width, height = _shown_size(images[0]) if images else (None, None)
    caption = record.caption or ""
    return Columns(
        key=record.key,
        caption=caption,
        words=len(caption.split()),
        characters=len(caption),
        bytes=sum(map(len, contents)) if contents else None,
        format=(images[0].format or "") if images else None,
        width=width,
        height=height,
        aspect=max(width, height) / min(width, height) if width and height else None,
        picture=digest(*contents) if contents else None,
    )


def _opened(data: bytes, key: str) -> Image.Image:
    try:
        return open_image(data, name=key)
    except ImageError as error:
        raise RecordError(error.message, picture_reason(error)) from error


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as a viewer shows them."""
    width, height = image.size
    if "exif" in image.info and orientation(image) >= 5:  # without this a PNG would be decoded to look for it
        return height, width
    return width, height


def digest(*pieces: bytes) -> Digest:
    """A digest of 16 bytes: two different ones of a billion are equal with a chance of 10⁻²¹."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        found.update(len(piece).to_bytes(8, "little"))  # tells (ab, c) from (a, bc)
        found.update(piece)
    return found.digest()
