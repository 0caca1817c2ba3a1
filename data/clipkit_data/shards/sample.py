"""One sample of a shard: the places of its members, and reading them in one go.

The members of a sample lie side by side in the tar, so a sample is one positioned read, from the first
member's data to the end of the last. Where the CRC-32 of the data is known it is compared at every read.
What a sample is a sample of, its content, is told by the extensions of its members (`contents_of`).
"""

import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import DataError
from clipkit_data.records import Record, RecordError, parse_caption, parse_meta
from clipkit_data.remote.retry import Retry

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
CLIP_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi")
GRAPH_EXTENSION = "graph.npz"
TEXT_EXTENSIONS = frozenset(("txt", "json", "cls"))  # all that a sample of text alone may have
_FRAME = re.compile(rf"([0-9]+)\.(?:{'|'.join(IMAGE_EXTENSIONS)})")

RETRY = Retry()
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sound sample.

    Args:
        key: What its members' names have in common.
        members: Byte offset and size of each member's data by extension, in file order.
        header: Byte offset of its first header.
        crc32: Of the members' data in order; None where nobody has read them yet.
    """

    key: str
    members: dict[str, Span]
    header: int = 0
    crc32: int | None = None


def contents_of(extensions: Iterable[str]) -> list[list[str]]:
    """Each content among the members of a sample: a picture, a clip, all numbered frames, or a graph.

    A sound sample has one. `key.0.jpg, key.1.jpg, …` are the frames of one clip, in the order of numbers. Of
    several kinds the first in this order counts: a picture may have a clip or numbered extras beside it.
    """
    extensions = list(extensions)
    for kind in (IMAGE_EXTENSIONS, CLIP_EXTENSIONS):
        if found := [[name] for name in extensions if name in kind]:
            return found
    numbers = {name: int(match[1]) for name in extensions if (match := _FRAME.fullmatch(name))}
    if numbers:
        return [sorted(numbers, key=lambda name: numbers[name])]
    return [[name] for name in extensions if name == GRAPH_EXTENSION]


def to_record(id_: tuple[int, int], key: str, members: Mapping[str, bytes], where: str) -> Record:
    """A sample's members as a record. Raises: RecordError for a caption or json that is bad."""
    content = next(iter(contents_of(members)), [])
    meta = parse_meta(members["json"], where) if "json" in members else {}
    if "cls" in members:
        meta["cls"] = parse_caption(members["cls"], where)
    return Record(
        id=id_,
        key=key,
        image=members[content[0]] if content else b"",
        caption=parse_caption(members["txt"], where) if "txt" in members else None,
        meta=meta,
        frames=tuple(members[name] for name in content) if len(content) > 1 else (),
        extension=content[0] if len(content) == 1 else "",
    )


def is_picture(extension: str) -> bool:
    """Whether a member is a picture: a sample's own, or a frame."""
    return extension in IMAGE_EXTENSIONS or _FRAME.fullmatch(extension) is not None


def read_span(file: int, span: Span, where: str) -> bytes:
    """The bytes of one member, tried again where a network's file system hesitates.

    Raises:
        DataError: They cannot be read, or are no longer there.
    """
    data = b""
    while len(data) < span[1]:  # one read returns at most 2 GiB
        left, at = span[1] - len(data), span[0] + len(data)
        more = RETRY.call(lambda left=left, at=at: os.pread(file, left, at), where)
        if not more:
            raise DataError(f"{where}: the shard became shorter after it was indexed")
        data = data + more if data else more
    return data


def crc32_of(parts: Iterable[bytes | memoryview]) -> int:
    """The CRC-32 of several pieces of data, one after the other."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def read_sample(file: int, sample: Sample, shard: Path | str) -> dict[str, bytes]:
    """The data of a sample's members by extension, in one read: they lie side by side.

    Args:
        file: Descriptor of the shard or of a copy of it.
        sample: From the shard's index.
        shard: What to call it in messages.

    Raises:
        RecordError: The data have not the CRC-32 that the index has ("CRC").
        DataError: They cannot be read.
    """
    start = min(offset for offset, _ in sample.members.values())
    end = max(offset + size for offset, size in sample.members.values())
    where = f"{shard}: {sample.key}"
    data = memoryview(read_span(file, (start, end - start), where))
    places = {name: (offset - start, size) for name, (offset, size) in sample.members.items()}
    parts = {name: data[place : place + size] for name, (place, size) in places.items()}
    if sample.crc32 is not None and crc32_of(parts.values()) != sample.crc32:
        raise RecordError(
            f"{where}: the bytes from offset {start} on are not those that were indexed (CRC)", "CRC"
        )
    return {name: bytes(part) for name, part in parts.items()}
