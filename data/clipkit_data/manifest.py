"""Index files for shards, and the `manifest.json` of a folder that sums them up.

An index file (`clipkit_data.index_file`) says where each sample of a shard lies; the manifest says, in one
file for a whole folder, how many samples each shard has and the digest of their list. So thousands of shards
are opened by reading one file, and the index of a shard is read when its first sample is.

What is done stays done: an index file that is whole and no older than its shard is kept, so that an
interrupted run is continued by starting it again. The manifest is written last.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit.files import atomic_write
from clipkit_data.energon import EnergonSamples, export_energon_index
from clipkit_data.index_file import (
    SampleTable,
    in_columns,
    index_path,
    iter_crc32,
    newer,
    read_index,
    write_index,
)
from clipkit_data.shards import Fault, ShardIndex, scan_shard

__all__ = ["MANIFEST", "Entry", "entry_of", "export_energon_index", "index_shards", "parse_manifest"]

MANIFEST = "manifest.json"
FORMAT = 1
_FEW = 256 << 20  # bytes of shards for which starting processes takes longer than it saves


class Entry(NamedTuple):
    """What a manifest says of one shard.

    Args:
        name: File name.
        bytes: Size of the tar file.
        samples: Sound samples in it.
        digest: SHA-256 over their keys and members, see `clipkit_data.index_file`.
        faults: How many faults its index file lists.
        extensions: The extensions of its samples' members, by name.
    """

    name: str
    bytes: int
    samples: int
    digest: str
    faults: int
    extensions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON."""
        return self._asdict() | {"extensions": list(self.extensions)}


def entry_of(name: str, index: ShardIndex, samples: SampleTable | EnergonSamples) -> Entry:
    """The manifest's entry for a shard with this index and its samples in columns."""
    extensions = tuple(samples.extensions)
    return Entry(name, index.bytes, len(samples), samples.digest, len(index.faults), extensions)


def parse_manifest(data: bytes, name: str) -> dict[str, Entry]:
    """The shards of a manifest by file name. Raises: DataError when it is none, or of a newer format."""
    try:
        found = json.loads(data)
        if found["format"] > FORMAT:
            raise DataError(f"{name}: format {found['format']} is newer than this clipkit reads ({FORMAT})")
        same: dict[tuple[str, ...], tuple[str, ...]] = {}  # thousands of shards have the same extensions
        entries = {}
        for shard in found["shards"]:
            extensions = tuple(shard["extensions"])
            shard["extensions"] = same.setdefault(extensions, extensions)
            entries[shard["name"]] = Entry(**{field: shard[field] for field in Entry._fields})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is no manifest of shards: {error!r}") from error
    return entries


def index_shards(
    spec: str | Path | Sequence[str | Path],
    *,
    jobs: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Write the index file of each shard, and the manifest of their folder.

    Each shard is read once in full, for its samples' CRC-32s. The manifest lists every shard of the folder
    that has an up-to-date index file, also when `spec` names only some of them.

    Args:
        spec: Shards on this machine, as `clipkit_data.sources.resolve_shards` takes them.
        jobs: Processes; by default one for each core, or none for a few small shards. They are started
            afresh, so a script that calls this needs its `if __name__ == "__main__"`.
        progress: Called with 1 after each shard.

    Returns:
        `{"shards": n, "samples": n, "faults": [Fault as JSON, …], "manifest": path}`; the paths are joined
        with ", " when the shards lie in several folders.

    Raises:
        NotFoundError: There are no such shards.
        InputError: They are on another machine.
        DataError: A shard cannot be read or changed meanwhile, or an index file cannot be written.
    """
    from clipkit_data.sources import resolve_shards

    shards: list[Path] = []
    for shard in resolve_shards(spec):
        if not isinstance(shard, Path):
            raise InputError(
                f"{shard} cannot be indexed: an index file is written beside its shard",
                hint="index shards where they are written, and copy index files and manifest.json with them",
            )
        shards.append(shard)
    if jobs is None:
        jobs = 1 if sum(shard.stat().st_size for shard in shards) < _FEW else os.cpu_count() or 1
    folders: dict[Path, dict[str, Entry]] = {}
    faults: list[Fault] = []
    for shard, (entry, found) in zip(shards, _each(shards, jobs), strict=True):
        folders.setdefault(shard.parent, {})[entry.name] = entry
        faults += found
        if progress:
            progress(1)
    manifests = [str(_write_manifest(folder, entries)) for folder, entries in folders.items()]
    return {
        "shards": len(shards),
        "samples": sum(entry.samples for entries in folders.values() for entry in entries.values()),
        "faults": [fault.to_json() for fault in faults],
        "manifest": ", ".join(manifests),
    }


def index_shard(shard: Path) -> tuple[Entry, list[Fault]]:
    """Write one shard's index file, unless it is there and up to date. Raises: NotFoundError, DataError."""
    if not shard.is_file():
        raise NotFoundError(f"no such shard: {shard}")
    before = shard.stat()
    index = _up_to_date(shard, before)
    if index is None:
        index = scan_shard(shard)
        crc32 = list(iter_crc32(shard, index.samples))
        after = shard.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{shard} changed while it was read", hint="index shards once they are complete")
        try:
            index.samples = write_index(shard, index, crc32)
        except OSError as error:
            path = index_path(shard)
            raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    return entry_of(shard.name, index, in_columns(index.samples)), index.faults


def _up_to_date(shard: Path, status: os.stat_result) -> ShardIndex | None:
    if newer(status, index_path(shard)):
        return None
    try:
        return read_index(shard, status.st_size)
    except DataError:
        return None


def _each(shards: Sequence[Path], jobs: int) -> Iterator[tuple[Entry, list[Fault]]]:
    """`index_shard` of each shard, in order, by several processes."""
    if min(jobs, len(shards)) <= 1:
        yield from map(index_shard, shards)
        return
    pool = ProcessPoolExecutor(min(jobs, len(shards)), mp_context=get_context("spawn"))
    try:
        yield from pool.map(index_shard, shards)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that indexes shards ended unexpectedly", hint="run it again with fewer jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_manifest(folder: Path, known: dict[str, Entry]) -> Path:
    """Write the manifest of a folder: the entries known, and those of other shards with index files."""
    entries = dict(known)
    for shard in folder.glob("*.tar"):
        if shard.name not in entries and shard.is_file():
            index = _up_to_date(shard, shard.stat())
            if index is not None:
                entries[shard.name] = entry_of(shard.name, index, in_columns(index.samples))
    lines = ",\n".join(json.dumps(entries[name].to_json(), ensure_ascii=False) for name in sorted(entries))
    path = folder / MANIFEST
    try:
        atomic_write(path, f'{{"format": {FORMAT}, "shards": [\n{lines}\n]}}\n')
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
