"""WebDataset shards: which samples a tar file holds, where each member lies, and what is wrong with it.

A shard is scanned once, headers only (`clipkit_data.tar`); after that any sample is one or two positioned
reads away. Consecutive members with one key are a sample, as in `webdataset`: `key.jpg`, `key.txt`,
`key.json`. A sample that lacks a member, comes twice or is torn apart is left out of the index and reported
as a `Fault` with shard, sample, byte offset and reason; so is every damage of the tar itself.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clipkit.errors import DataError, ImageError, NotFoundError
from clipkit.files import sha256_file
from clipkit_data.records import RecordError, parse_caption, parse_meta
from clipkit_data.tar import Damage, Member, scan_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")

Span = tuple[int, int]


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


@dataclass(frozen=True, slots=True)
class Sample:
    """One sound sample: its key and, for each extension, the offset and size of the member's data."""

    key: str
    members: dict[str, Span]

    @property
    def image(self) -> str:
        """The extension of its picture."""
        return next(extension for extension in self.members if extension in IMAGE_EXTENSIONS)


@dataclass(slots=True)
class ShardIndex:
    """What one shard holds: the sound samples in order, and the faults."""

    path: Path
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    groups: int = 0
    """Number of samples found, with those that were left out."""


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


def scan_shard(path: Path | str) -> ShardIndex:
    """The index of one shard.

    Samples with a fault that concerns their picture or caption are left out; the rest stay readable.

    Args:
        path: An uncompressed tar file.

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
        entries = scan_tar(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    index = ShardIndex(path)
    groups = _group(entries, index)
    index.groups = len(groups)
    extensions = {extension for group in groups for extension in group.members}
    usual = {frozenset(group.members) for group in groups if not (group.broken or group.touched)}
    for group in groups:
        sample = _sample(group, extensions, usual, index)
        if sample is not None:
            index.samples.append(sample)
    index.faults.sort(key=lambda fault: fault.offset or 0)
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
        if names is None or _META.match(entry.name):
            if not _META.match(entry.name):
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
    group: _Group, extensions: set[str], usual: set[frozenset[str]], index: ShardIndex
) -> Sample | None:
    """The group as a sample, or None and a fault when its picture or caption is missing.

    Captions and `.json` are missed only where some sample of the shard (`extensions`) has them. Beside a
    lost member a sample counts as whole only when an untouched one (`usual`) has the same extensions.
    """
    if group.broken:
        return None
    faults = []
    images = [extension for extension in group.members if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        faults.append("several pictures" if images else "missing picture")
    if "txt" not in group.members and "txt" in extensions:
        faults.append("missing caption")
    if not faults and group.touched and frozenset(group.members) not in usual:
        faults.append("possibly incomplete")
    left_out = bool(faults)
    if "json" not in group.members and "json" in extensions:
        faults.append("missing json")
    index.faults.extend(Fault(str(index.path), group.key, group.offset, reason) for reason in faults)
    return None if left_out else Sample(group.key, group.members)


def read_span(file: int, span: Span, where: str) -> bytes:
    """The bytes of one member. Raises: DataError when they cannot be read or are no longer there."""
    data = b""
    while len(data) < span[1]:  # one read returns at most 2 GiB
        try:
            more = os.pread(file, span[1] - len(data), span[0] + len(data))
        except OSError as error:
            raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
        if not more:
            raise DataError(f"{where}: the shard became shorter after it was indexed")
        data = data + more if data else more
    return data


def picture_reason(error: ImageError) -> str:
    """The fixed phrase for a picture that cannot be used."""
    return f"picture {error.reason.replace('_', ' ')}"


def check_shard(path: Path | str, *, decode: bool = True) -> ShardIndex:
    """The index of a shard with every fault that can be found.

    Args:
        path: An uncompressed tar file.
        decode: Also read every sample: its picture decoded in full, its caption, its `.json`; and compare
            the shard with the `NAME_stats.json` beside it (number of samples, SHA-256 where it is given).
    """
    index = scan_shard(path)
    if decode:
        file = os.open(index.path, os.O_RDONLY)
        try:
            for sample in index.samples:
                index.faults.extend(_content_faults(index.path, file, sample))
        finally:
            os.close(file)
        index.faults.extend(_stats_faults(index))
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

    for extension, span in sample.members.items():
        where = f"{path}: {sample.key}.{extension}"
        try:
            data = read_span(file, span, where)
            if extension in IMAGE_EXTENSIONS:
                decode_image(data, name=where)
            elif extension == "txt" and not parse_caption(data, where):
                raise RecordError(f"{where}: the caption is empty", "empty caption")
            elif extension == "json":
                parse_meta(data, where)
        except ImageError as error:
            yield Fault(str(path), sample.key, span[0], picture_reason(error), error.message)
        except RecordError as error:
            yield Fault(str(path), sample.key, span[0], error.reason, error.message)


def _stats_faults(index: ShardIndex) -> Iterator[Fault]:
    """Where the shard differs from what its writer said of it."""
    path = index.path.with_name(f"{index.path.stem}_stats.json")
    if not path.is_file():
        return
    shard = str(index.path)
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        successes, digest = stats.get("successes"), stats.get("sha256")
    except (ValueError, AttributeError) as error:
        yield Fault(shard, None, None, "invalid stats", f"{path}: {error}")
        return
    if isinstance(successes, int) and successes != index.groups:
        detail = f"{path.name} says {successes}, the shard holds {index.groups}"
        yield Fault(shard, None, None, "number of samples", detail)
    if isinstance(digest, str) and digest != sha256_file(index.path):
        yield Fault(shard, None, None, "SHA-256", f"{path.name} names other bytes")
