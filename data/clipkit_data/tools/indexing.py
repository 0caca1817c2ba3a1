"""Index files for shards and the manifest of their folder: what `clipkit shards index` does.

What is done stays done: an index file that is whole and no older than its shard is kept, so that an
interrupted run is continued by starting it again. Faults that other files beside the shard have a part in
(`00000_stats.json`, `sizes.json`) are looked for again all the same. The manifest is written last.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit_data.batches.lost_workers import explaining_lost_workers
from clipkit_data.shards.counts import count_faults, stats_path
from clipkit_data.shards.index_file import in_columns, index_path, iter_crc32, newer, read_index, write_index
from clipkit_data.shards.manifest import Entry, entry_of, write_manifest
from clipkit_data.shards.scan import Fault, ShardIndex, digest_faults, scan_shard
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.job import each, jobs_or_cores

_BESIDE = ("number of samples", "invalid stats", "SHA-256")  # the faults that are not the shard's alone
_FEW = 256 << 20  # bytes of shards for which starting processes takes longer than it saves


@explaining_lost_workers()
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
        jobs: Processes; by default one for each core, or none for a few small shards.
        progress: Called with 1 after each shard.

    Returns:
        `{"shards": n, "samples": n, "faults": [Fault as JSON, …], "manifest": path}`; the paths are joined
        with ", " when the shards lie in several folders.

    Raises:
        NotFoundError: There are no such shards.
        InputError: They are on another machine, or part of clipkit.
        DataError: A shard cannot be read or changed meanwhile, or an index file cannot be written.
    """
    if isinstance(spec, str) and spec.startswith("sample:"):
        raise InputError(f"{spec} is part of clipkit: it is opened as it is", hint="index your own shards")
    shards: list[Path] = []
    for shard in resolve_shards(spec):
        if not isinstance(shard, Path):
            raise InputError(
                f"{shard} cannot be indexed: an index file is written beside its shard",
                hint="index shards where they are written, and copy index files and manifest.json with them",
            )
        shards.append(shard)
    if jobs is None:
        jobs = 1 if sum(shard.stat().st_size for shard in shards) < _FEW else jobs_or_cores(None)
    folders: dict[Path, dict[str, Entry]] = {}
    faults: list[Fault] = []
    for shard, (entry, found) in zip(shards, each(index_shard, shards, jobs), strict=True):
        folders.setdefault(shard.parent, {})[entry.name] = entry
        faults += found
        if progress:
            progress(1)
    manifests = [
        str(write_manifest(folder, entries | _others(folder, entries))) for folder, entries in folders.items()
    ]
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
        index.faults += digest_faults(shard)
        crc32 = list(iter_crc32(shard, index.samples))
        after = shard.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"{shard} changed while it was read", hint="index shards once they are complete")
        _write(shard, index, crc32)
    elif (faults := _faults_now(shard, index)) != index.faults:
        index.faults = faults
        _write(shard, index, [sample.crc32 for sample in index.samples if sample.crc32 is not None])
    return entry_of(shard.name, index, in_columns(index.samples)), index.faults


def _write(shard: Path, index: ShardIndex, crc32: Sequence[int]) -> None:
    try:
        index.samples = write_index(shard, index, crc32)
    except OSError as error:
        path = index_path(shard)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def _faults_now(shard: Path, index: ShardIndex) -> list[Fault]:
    """The faults of an index file that is up to date, with those that other files have a part in as of now.

    The SHA-256 is computed only where it may differ from the last time: it is the shard that takes long.
    """
    faults = [fault for fault in index.faults if fault.reason not in _BESIDE]
    faults += [Fault(str(shard), None, None, *fault) for fault in count_faults(shard, index.groups)]
    stats, was_wrong = stats_path(shard), any(fault.reason == "SHA-256" for fault in index.faults)
    if was_wrong or (stats.is_file() and newer(stats.stat(), index_path(shard))):
        faults += digest_faults(shard)
    return faults


def _up_to_date(shard: Path, status: os.stat_result) -> ShardIndex | None:
    if newer(status, index_path(shard)):
        return None
    try:
        return read_index(shard, status.st_size)
    except DataError:
        return None


def _others(folder: Path, known: dict[str, Entry]) -> dict[str, Entry]:
    """The entries of a folder's other shards that have up-to-date index files."""
    entries = {}
    for shard in folder.glob("*.tar"):
        if shard.name not in known and shard.is_file():
            index = _up_to_date(shard, shard.stat())
            if index is not None:
                entries[shard.name] = entry_of(shard.name, index, in_columns(index.samples))
    return entries
