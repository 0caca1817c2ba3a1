"""One sample of a shard: the places of its members, and reading them in one go.

The members of a sample lie side by side in the tar, so a sample is one positioned read, from the first
member's data to the end of the last. Where the CRC-32 of the data is known it is compared at every read.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clipkit.errors import DataError
from clipkit_data.records import RecordError
from clipkit_data.remote.retry import Retry

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")

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

    @property
    def image(self) -> str:
        """The extension of its picture."""
        return next(extension for extension in self.members if extension in IMAGE_EXTENSIONS)


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
