"""WebDataset shards: which samples a tar file holds, where each member lies, and what is wrong with it.

A shard is scanned once, headers only (`clipkit_data.shards.tar`); after that any sample is one positioned
read away. What a scan finds can be kept in a file (`clipkit_data.shards.index_file`). Consecutive members
with one key are a sample, as in `webdataset`: `key.jpg`, `key.txt`, `key.json`. A sample that lacks a
member, comes twice or is torn apart is left out of the index and reported as a `Fault` with shard, sample,
byte offset and reason; so is every damage of the tar itself.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipkit.errors import DataError, ImageError, NotFoundError
from clipkit.files import sha256_file
from clipkit_data.records import RecordError, parse_caption, parse_meta
from clipkit_data.shards.counts import count_faults, read_stats
from clipkit_data.shards.sample import (
    TEXT_EXTENSIONS,
    Sample,
    Span,
    contents_of,
    is_picture,
    read_sample,
)
from clipkit_data.shards.tar import Damage, Member, scan_tar

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a shard.

    Args:
        shard: The shard's path.
        sample: The sample's key, None when it concerns no single sample.
        offset: Byte offset in the shard, None when it has no place.
        reason: One of a few fixed phrases.
        detail: What else is known, for people.
    """

    shard: str
    sample: str | None
    offset: int | None
    reason: str
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fault as plain JSON."""
        return asdict(self)


@dataclass(slots=True)
class ShardIndex:
    """What one shard holds: the sound samples in order, and the faults."""

    path: Path | str
    samples: Sequence[Sample] = ()
    faults: list[Fault] = field(default_factory=list)
    groups: int = 0
    """Number of samples found, with those that were left out."""
    bytes: int = 0
    """Size of the tar file."""


@dataclass(slots=True)
class _Group:
    key: str
    offset: int
    members: dict[str, Span] = field(default_factory=dict)
    broken: bool = False
    touched: bool = False
    """Whether a lost member right before or after it may be one of its own."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset splits them: at the first dot of the file name."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def is_metadata(name: str) -> bool:
    """Whether a member is of the shard and not of a sample (`__info__/…`), as webdataset takes it."""
    return _META.match(name) is not None


def scan_shard(path: Path | str, name: str | None = None) -> ShardIndex:
    """The index of one shard.

    Samples with a fault that concerns their picture or caption are left out; the rest stay readable. A
    number of samples that a `NAME_stats.json` or `sizes.json` beside it gives is compared.

    Args:
        path: An uncompressed tar file.
        name: What to call it in faults: for a copy, where it came from.

    Returns:
        The sound samples with the places of their members, and every fault found.

    Raises:
        NotFoundError: No such file.
        DataError: It cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no such shard: {path}")
    try:
        entries, size = scan_tar(path), path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    index = ShardIndex(name or path, bytes=size)
    groups = _group(entries, index)
    index.groups = len(groups)
    extensions = {extension for group in groups for extension in group.members}
    usual = {frozenset(group.members) for group in groups if not (group.broken or group.touched)}
    text_alone = all(group.members.keys() <= TEXT_EXTENSIONS for group in groups)
    found = [_sample(group, extensions, usual, index, text_alone) for group in groups]
    index.samples = [sample for sample in found if sample is not None]
    index.faults.sort(key=lambda fault: fault.offset or 0)
    index.faults += [Fault(str(index.path), None, None, *fault) for fault in count_faults(path, len(groups))]
    return index


def _group(entries: Sequence[Member | Damage], index: ShardIndex) -> list[_Group]:
    """Consecutive members with one key; keys that come again are faults."""
    groups: list[_Group] = []
    seen: dict[str, _Group] = {}
    after_damage = False

    def report(key: str | None, offset: int, reason: str, detail: str = "") -> None:
        index.faults.append(Fault(str(index.path), key, offset, reason, detail))

    def open_group(key: str, offset: int) -> _Group:
        group = groups[-1] if groups else None
        if group is None or group.key != key:
            group = _Group(key, offset)
            groups.append(group)
        return group

    for entry in entries:
        names = split_name(entry.name) if entry.name else None
        if isinstance(entry, Damage):
            report(names[0] if names else None, entry.offset, entry.reason, entry.name or "")
            if names and entry.lost:
                group = open_group(names[0], entry.offset)
                group.broken = True
                seen.setdefault(group.key, group)
            elif entry.lost:
                after_damage = True
                if groups:
                    groups[-1].touched = True
            continue
        if names is None or is_metadata(entry.name):
            if not is_metadata(entry.name):
                report(None, entry.header, "member name", f"{entry.name!r} is no KEY.EXTENSION")
            continue
        key, extension = names
        group = open_group(key, entry.header)
        group.touched, after_damage = group.touched or after_damage, False
        first = seen.setdefault(key, group)
        if first is not group and not group.members:
            torn = extension not in first.members
            report(key, entry.header, "members are not adjacent" if torn else "duplicate key")
            group.broken = True
            first.broken = first.broken or torn
        if extension in group.members:
            report(key, entry.header, "duplicate member", entry.name)
            group.broken = True
            continue
        group.members[extension] = (entry.offset, entry.size)
    return groups


def _sample(
    group: _Group, extensions: set[str], usual: set[frozenset[str]], index: ShardIndex, text_alone: bool
) -> Sample | None:
    """The group as a sample, or None and a fault when its content or caption is missing.

    The content is a picture, a clip or a graph. A shard of `.txt` with `.json` or `.cls` alone (`text_alone`)
    is one of texts.

    Captions and `.json` are missed only where some sample of the shard (`extensions`) has them. Beside a
    lost member a sample counts as whole only when an untouched one (`usual`) has the same extensions.
    """
    if group.broken:
        return None
    faults = []
    contents = contents_of(group.members)
    if len(contents) > 1:
        faults.append("several pictures")
    elif not contents and not (text_alone and "txt" in group.members):
        faults.append("missing picture")
    if "txt" not in group.members and "txt" in extensions:
        faults.append("missing caption")
    if not faults and group.touched and frozenset(group.members) not in usual:
        faults.append("possibly incomplete")
    left_out = bool(faults)
    if "json" not in group.members and "json" in extensions:
        faults.append("missing json")
    for reason in faults:
        detail = f"it has {', '.join(group.members)}" if reason.endswith(("picture", "pictures")) else ""
        index.faults.append(Fault(str(index.path), group.key, group.offset, reason, detail))
    return None if left_out else Sample(group.key, group.members, group.offset)


def picture_reason(error: ImageError) -> str:
    """The fixed phrase for a picture that cannot be used."""
    return f"picture {error.reason.replace('_', ' ')}"


def check_shard(path: Path | str, *, decode: bool = True) -> ShardIndex:
    """The index of a shard with every fault that can be found.

    Args:
        path: An uncompressed tar file.
        decode: Also read every sample: its picture decoded in full, its caption, its `.json`, its CRC-32
            where the shard has an index file; and the SHA-256 that the `NAME_stats.json` beside it may give.
    """
    from clipkit_data.shards.index_file import with_crc32

    path = Path(path)
    index = scan_shard(path)
    index.samples, index_fault = with_crc32(path, index.samples)
    if index_fault:
        index.faults.append(Fault(str(path), None, None, "index file", index_fault))
    if decode:
        file = os.open(path, os.O_RDONLY)
        try:
            for sample in index.samples:
                index.faults.extend(_content_faults(path, file, sample))
        finally:
            os.close(file)
        index.faults.extend(digest_faults(path))
    return index


def check_shards(
    paths: Sequence[Path | str], *, decode: bool = True, progress: Callable[[int], Any] | None = None
) -> list[Fault]:
    """The faults of several shards, in order; an empty list when all are sound.

    Args:
        paths: Uncompressed tar files.
        decode: See `check_shard`.
        progress: Called with 1 after each shard.
    """
    faults: list[Fault] = []
    for path in paths:
        faults.extend(check_shard(path, decode=decode).faults)
        if progress:
            progress(1)
    return faults


def _content_faults(path: Path, file: int, sample: Sample) -> Iterator[Fault]:
    """What is wrong inside the members of a sample."""
    from clipkit.images import decode_image

    try:
        members = read_sample(file, sample, path)
    except RecordError as error:
        yield Fault(str(path), sample.key, sample.header, error.reason, error.message)
        return
    for extension, data in members.items():
        where = f"{path}: {sample.key}.{extension}"
        try:
            if is_picture(extension):
                decode_image(data, name=where)
            elif extension == "txt" and not parse_caption(data, where):
                raise RecordError(f"{where}: the caption is empty", "empty caption")
            elif extension == "json":
                parse_meta(data, where)
        except (ImageError, RecordError) as error:
            reason = picture_reason(error) if isinstance(error, ImageError) else error.reason
            yield Fault(str(path), sample.key, sample.members[extension][0], reason, error.message)


def digest_faults(path: Path) -> Iterator[Fault]:
    """Where the shard has not the SHA-256 that its writer gave."""
    try:
        digest = read_stats(path).get("sha256")
    except (OSError, ValueError):
        return  # reported by the scan
    if isinstance(digest, str) and digest != sha256_file(path):
        yield Fault(str(path), None, None, "SHA-256", f"{path.stem}_stats.json names other bytes")
