"""Opening shards: what is in each, learned in the cheapest way that can be trusted.

In this order: the folder's manifest, if the shard has the size it names and an index file no older than the
shard; the index file; Megatron-Energon's `.tar.idx`; a scan of the shard's headers. What has been changed
since it was indexed is scanned again, and so is a shard whose index file is damaged: the scan is the truth,
and whoever was promised other samples compares digests. Only the CRC-32s are missing then, and a warning
says so. Remote shards have no times to compare; their sizes are, when they are fetched.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.errors import ClipkitError, DataError, NotFoundError
from clipkit_data.remote.cache import ShardFiles
from clipkit_data.remote.storage import is_http, is_remote, list_shards, read_bytes, shown
from clipkit_data.shards.energon import EnergonSamples, energon_path, read_energon_index
from clipkit_data.shards.index_file import (
    CHANGED,
    SampleTable,
    in_columns,
    index_name,
    index_path,
    newer,
    parse_index,
    read_index,
    with_crc32,
)
from clipkit_data.shards.manifest import MANIFEST, Entry, entry_of, parse_manifest
from clipkit_data.shards.scan import Fault, ShardIndex, scan_shard

RESTORE = "put back what is gone, or run `clipkit shards index` if it was removed on purpose"
_NAMED = 5


@dataclass(frozen=True, slots=True)
class Found:
    """One shard as it was found: its entry, its faults, and its samples unless they can be read again."""

    entry: Entry
    faults: list[Fault]
    samples: SampleTable | EnergonSamples | None


def label(shard: str) -> str:
    """A shard in messages: a path, or an URL without passwords and signatures."""
    return shown(shard) if is_remote(shard) else shard


def shard_name(shard: str) -> str:
    """The file name of a shard."""
    return os.path.basename(label(shard))


def beside(shard: str, name: str) -> str:
    """The path or URL of another file in a shard's folder; a query is kept."""
    if not is_http(shard):
        return os.path.join(os.path.dirname(shard), name)
    path, mark, query = shard.partition("?")
    return path.rpartition("/")[0] + f"/{name}" + mark + query


def _stat(shard: str) -> os.stat_result:
    try:
        return os.stat(shard)
    except FileNotFoundError:
        raise NotFoundError(f"no such shard: {shard}") from None
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error


def load_index(
    shard: str, files: ShardFiles | None, warn: Callable[[str], Any], size: int | None = None
) -> ShardIndex:
    """The index of one shard: from a file, or by a scan; its `samples` are in columns.

    Args:
        shard: A path or URL.
        files: For URLs.
        warn: Called with what makes a file beside the shard useless.
        size: Bytes that a remote shard must have.

    Raises:
        NotFoundError: No such shard.
        DataError: It cannot be read or fetched.
    """
    index = _remote_index(shard, warn, size) if is_remote(shard) else _local_index(Path(shard), warn)
    if index is None:
        index = scan_shard(shard if files is None else files.local(shard, size), label(shard))
        index.samples = in_columns(index.samples)
    return index


def _remote_index(url: str, warn: Callable[[str], Any], size: int | None) -> ShardIndex | None:
    path = beside(url, index_name(shard_name(url)))
    data = read_bytes(path)
    try:
        return None if data is None else parse_index(data, label(path), label(url), size)
    except DataError as error:
        warn(f"{error}; the whole shard is fetched and scanned, and its data are not checked")
        return None


def _local_index(path: Path, warn: Callable[[str], Any]) -> ShardIndex | None:
    status, index = _stat(str(path)), index_path(path)
    if not newer(status, index):
        try:
            return read_index(path, status.st_size)
        except DataError as error:
            warn(f"{error}; the shard is scanned instead, and its data are not checked")
    elif index.exists():
        found = scan_shard(path)
        samples, wrong = with_crc32(path, found.samples)
        if wrong is None:  # a copy, or a touch: each sample still has to have its CRC-32
            found.samples = in_columns(samples)
            return found
        warn(f"{path} changed after it was indexed: it is scanned, and its data are not checked ({CHANGED})")
    elif not newer(status, energon_path(path)):
        samples = read_energon_index(path)
        if samples:
            return ShardIndex(path, samples, groups=len(samples), bytes=status.st_size)
        warn(f"{energon_path(path)} does not fit the shard: it is scanned instead")
    return None


class Manifests:
    """The manifests of the shards' folders, each read once.

    Args:
        warn: Called with what makes one useless.
    """

    def __init__(self, warn: Callable[[str], Any]) -> None:
        self.warn = warn
        self._read: dict[str, dict[str, Entry]] = {}

    def entry(self, shard: str) -> Entry | None:
        """What the manifest says of a shard, None when there is none or it is not of this shard."""
        entry = self._of(beside(shard, MANIFEST)).get(shard_name(shard))
        if entry is None or is_remote(shard):
            return entry
        status = _stat(shard)
        stale = entry.bytes != status.st_size or newer(status, index_name(shard))
        return None if stale else entry

    def missing(self, shards: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        """Each manifest that names shards which are no longer in its folder, and their names.

        Only folders of which `shards` names all that is there: whoever reads a part misses nothing. HTTP has
        no folders to look into; there a shard that is gone shows when it is read.
        """
        given: dict[str, set[str]] = {}
        for shard in shards:
            if not is_http(shard):
                given.setdefault(beside(shard, MANIFEST), set()).add(shard_name(shard))
        for path, names in given.items():
            gone = self._of(path).keys() - names
            if is_remote(path) and len(gone) > len(names):
                continue  # a part, no doubt: no need to have the store list its files
            there = _shards_beside(path) if gone else None
            if there is not None and there <= names:
                yield path, sorted(gone)

    def _of(self, path: str) -> dict[str, Entry]:
        folder = label(path)  # signatures differ from shard to shard
        if folder not in self._read:
            self._read[folder] = self._entries(path)
        return self._read[folder]

    def _entries(self, path: str) -> dict[str, Entry]:
        # A store that does not answer stops here: without a manifest all shards would be fetched and scanned.
        data = read_bytes(path) if is_remote(path) else None
        try:
            if not is_remote(path) and Path(path).is_file():
                data = Path(path).read_bytes()
            return {} if data is None else parse_manifest(data, label(path))
        except (DataError, OSError) as error:
            self.warn(f"{error}; it is not used")
            return {}


def _shards_beside(path: str) -> set[str] | None:
    """The names of all shards in a file's folder; None where it cannot be listed."""
    folder = os.path.dirname(path)
    try:
        if is_remote(path):
            return set(map(shard_name, list_shards(folder)))
        return {item.name for item in os.scandir(folder or ".") if item.name.endswith(".tar")}
    except (ClipkitError, OSError):
        return None


def describe(
    shards: Sequence[str],
    files: ShardFiles | None,
    warn: Callable[[str], Any],
    *,
    jobs: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[Found]:
    """What is in each shard.

    Args:
        shards: Paths and URLs.
        files: For URLs.
        warn: Called once with the first thing that makes files beside shards useless, and how many more;
            and for each manifest that names shards which are gone.
        jobs: Threads for shards that no manifest covers; by default some for each core.
        progress: Called with the number of shards done.

    Raises:
        NotFoundError: A shard does not exist.
        DataError: A shard cannot be read or fetched.
    """
    notes: list[str] = []
    manifests = Manifests(notes.append)
    entries = [manifests.entry(shard) for shard in shards]
    for path, gone in manifests.missing(shards):
        names = ", ".join(gone[:_NAMED]) + (f" and {len(gone) - _NAMED} more" if gone[_NAMED:] else "")
        warn(f"{label(path)} lists shards that are not there ({names}): {RESTORE}")
    rest = [number for number, entry in enumerate(entries) if entry is None or entry.faults]
    if progress and len(rest) < len(shards):
        progress(len(shards) - len(rest))

    def learn(number: int) -> Found:
        known = entries[number]
        index = load_index(shards[number], files, notes.append, known.bytes if known else None)
        samples = index.samples
        assert isinstance(samples, SampleTable | EnergonSamples)
        entry = entry_of(shard_name(shards[number]), index, samples)
        return Found(entry, index.faults, None if samples.has_crc32 else samples)

    found = {number: Found(entry, [], None) for number, entry in enumerate(entries) if entry is not None}
    pool = ThreadPoolExecutor(jobs or min(32, 4 * (os.cpu_count() or 1)))
    try:
        for number, one in zip(rest, pool.map(learn, rest), strict=True):
            found[number] = one
            if progress:
                progress(1)
    finally:
        pool.shutdown(cancel_futures=True)
    if notes:
        warn(notes[0] + (f"; and {len(notes) - 1} more like it" if notes[1:] else ""))
    return [found[number] for number in range(len(shards))]
