"""The headers of a tar file, read strictly: every member with its place, and every damage with its place.

Python's `tarfile` (and all that is built on it) takes a damaged header for the end of the archive and stops
without a word. This reader checks what a tar can tell about itself: each header's checksum, the zeros that
pad each member, the two zero blocks that end the archive and the padding after them. After a damaged header
it looks for the next sound one, so that one bad byte costs one member and not the rest of the shard.

Layout (POSIX.1-1988 ustar, GNU and pax long names): blocks of 512 bytes; a header block, the data, zeros up
to the next block; at the end two zero blocks, then zeros up to a record of 10240 bytes (some writers, for
example Go's and Rust's, leave these last zeros out).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
RECORD = 20 * BLOCK
_ZEROS = bytes(BLOCK)
_CHUNK = 2048 * BLOCK
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAMES = {b"L": "name", b"K": "link", b"x": "pax", b"X": "pax", b"g": "global"}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in the archive: its name, where its header begins, and where its data lies."""

    name: str
    header: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not as a tar has it: where, what, and the member's name when it is known.

    `lost` is true when a member may be lost here: the one that it names, or one whose name is unknown.
    """

    offset: int
    reason: str
    name: str | None = None
    lost: bool = False


@dataclass(frozen=True, slots=True)
class _Header:
    name: bytes
    size: int
    kind: bytes


def _number(field: bytes) -> int | None:
    """A header number: octal digits, or base 256 when the first bit is set."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit < 56 for digit in digits) else None


def _parse(block: bytes) -> _Header | None:
    """The header in a block, or None when its checksum does not hold.

    Only the usual spellings of the checksum are taken, and no two of them are one byte apart: a changed
    byte in the checksum field itself is seen as well.
    """
    total = sum(block) - sum(block[148:156]) + 8 * 32
    octal = b"%06o" % total
    if block[148:156] not in (octal + b"\0 ", octal + b" \0", b"0" + octal + b"\0"):
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _Header(name, size, block[156:157])


def _pax(data: bytes) -> dict[bytes, bytes] | None:
    """The records of a pax header (`length key=value\\n` each), or None when they do not parse."""
    records: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            return None
        record = data[len(length) + 1 : int(length)]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        records[key] = value[:-1]
        data = data[int(length) :]
    return records


class _Scan:
    """One pass over the headers of an open file."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.size = os.fstat(file).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.file, length, offset)

    def entries(self, position: int = 0, stop: int | None = None) -> Iterator[Member | Damage]:
        """Members and damages in file order: all of them, or those whose headers begin before `stop`."""
        start, name, size = 0, None, None  # what long-name headers say of the member after them
        if position == 0 and self.read(0, 6).startswith(_COMPRESSED):
            yield Damage(0, "compressed archive")
            return
        while stop is None or position < stop:
            block = self.read(position, BLOCK)
            if len(block) < BLOCK:
                reason = "no end-of-archive marker" if not block else "cut header"
                yield Damage(position, reason, lost=True)
                return
            if block == _ZEROS and not any(self.read(position + BLOCK, BLOCK)):
                yield from self.ending(position)
                return
            header = _parse(block)
            if header is None:
                reason = "zero block inside the archive" if block == _ZEROS else "header checksum"
                yield Damage(position, reason, lost=True)
                position = self.next_header(position + BLOCK)
                start, name, size = 0, None, None
                continue
            data, kind = position + BLOCK, header.kind
            long_name = _LONG_NAMES.get(kind)
            length = header.size if long_name or size is None else size
            following = data + -(-length // BLOCK) * BLOCK
            label = (name if name is not None and not long_name else header.name).decode("utf-8", "replace")
            if following > self.size:
                yield Damage(position, "cut data", None if long_name else label, lost=True)
                return
            if any(self.read(data + length, following - data - length)):
                yield Damage(data + length, "padding is not zero", None if long_name else label)
            if long_name:
                if long_name != "global":  # which is no part of the member after it
                    start = start or position + 1  # an offset plus one, so that 0 says there is none
                records = _extension(long_name, self.read(data, length))
                if records is None:
                    yield Damage(position, "extended header", lost=True)
                else:
                    name, size = records.get("path", name), records.get("size", size)
                    size = int(size) if size is not None else None
            else:
                begin = start - 1 if start else position
                yield from _member(kind, header.name if name is None else name, begin, data, length)
                start, name, size = 0, None, None
            position = following

    def next_header(self, position: int) -> int:
        """Where the next sound header is, else where the zeros at the end of the file begin."""
        zeros = position
        while position < self.size:
            chunk = self.read(position, _CHUNK)
            for place in range(0, len(chunk), BLOCK):
                block = chunk[place : place + BLOCK]
                if block[257:262] == b"ustar" and _parse(block) is not None:
                    return position + place
                if any(block):
                    zeros = position + place + BLOCK
            position += len(chunk)
        return min(zeros, self.size)

    def ending(self, position: int) -> Iterator[Damage]:
        """What is wrong with the zeros from `position` to the end of the file."""
        rest = self.size - position
        if rest < 2 * BLOCK:
            yield Damage(position, "cut end-of-archive marker")
            return
        for offset in range(position, self.size, _CHUNK):
            chunk = self.read(offset, _CHUNK)
            if any(chunk):
                yield Damage(
                    offset + len(chunk) - len(chunk.lstrip(b"\0")), "data after the end-of-archive marker"
                )
                return
        if rest != 2 * BLOCK and self.size % RECORD:
            yield Damage(self.size, "cut padding")


def _extension(kind: str, data: bytes) -> dict[str, bytes] | None:
    """What a long-name or pax header says of the next member: `path` and `size`; None when damaged."""
    if kind == "name":
        return {"path": data.rstrip(b"\0")} if data.endswith(b"\0") else None
    if kind == "link":
        return {}
    records = _pax(data)
    if records is None or not records.get(b"size", b"0").isdigit():
        return None
    if kind == "global":
        return {}
    return {key.decode(): value for key, value in records.items() if key in (b"path", b"size")}


def _member(kind: bytes, name: bytes, header: int, offset: int, size: int) -> Iterator[Member | Damage]:
    """The member, nothing for a folder, or a damage for what a shard cannot hold."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        yield Damage(header, "name is not UTF-8", name.decode("utf-8", "replace"), lost=True)
        return
    if kind == b"5" or (kind == b"\0" and text.endswith("/")):
        return
    if kind in _REGULAR:
        yield Member(text, header, offset, size)
    else:
        yield Damage(header, "member is no regular file", text, lost=True)


def scan_tar(path: Path | str) -> list[Member | Damage]:
    """Every member and every damage of a tar file, in file order; the data itself is not read.

    Args:
        path: An uncompressed tar file.

    References:
        POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
    """
    file = os.open(path, os.O_RDONLY)
    try:
        return list(_Scan(file).entries())
    finally:
        os.close(file)


def scan_part(file: int, start: int, stop: int) -> list[Member | Damage]:
    """The members and damages of an open tar file whose headers begin in [start, stop).

    Args:
        file: File descriptor.
        start: Byte offset of a header.
        stop: Byte offset of the header that is no longer wanted, or of the archive's end.
    """
    return list(_Scan(file).entries(start, stop))
