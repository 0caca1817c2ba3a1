"""Verifying several shards at once: `check_shard` of each, by several processes, and their manifests.

A shard elsewhere is checked as one here: its copy, with the files that lie beside it there laid beside it.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipkit.errors import DataError
from clipkit_data.remote.cache import ShardFiles
from clipkit_data.remote.storage import is_remote, read_bytes
from clipkit_data.shards.counts import read_stats, stats_path
from clipkit_data.shards.index_file import index_path
from clipkit_data.shards.manifest import MANIFEST, parse_manifest
from clipkit_data.shards.opening import RESTORE, Manifests, beside, label, shard_name
from clipkit_data.shards.scan import Fault, ShardIndex, check_shard
from clipkit_data.tools.job import each, jobs_or_cores

log = logging.getLogger("clipkit_data")


def check_in_processes(
    shards: Sequence[str | Path], *, decode: bool = True, jobs: int | None = None
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Verify shards.

    Args:
        shards: Paths and URLs; what is remote is fetched whole, with its index file and its `_stats.json`.
            Where it has neither, no checksum is compared, and at the end a warning says so.
        decode: See `check_shard`.
        jobs: Most processes; None is one per core.

    Yields:
        The faults of each shard, as JSON, and its number of readable samples; in order.

    Raises:
        NotFoundError, DataError: A shard is not there or cannot be read.
    """
    bare = []
    found = each(_Check(decode), list(shards), jobs_or_cores(jobs))
    for shard, (faults, samples, compared) in zip(shards, found, strict=True):
        if decode and not compared:
            bare.append(label(str(shard)))
        yield faults, samples
    if bare:
        log.warning(
            "%s: its checksums were not compared: no index file lies beside it%s; "
            "run `clipkit shards index` where the shards lie",
            bare[0],
            f", nor beside {len(bare) - 1} others" if bare[1:] else "",
        )


def check_manifests(shards: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The faults of the manifests in the shards' folders, as JSON.

    They are damaged manifests on this machine, and shards that a manifest names and that are gone: these
    where `shards` are all that is left in a folder, for a part of it says nothing of the rest.
    """
    faults = []
    local = [Path(shard) for shard in shards if not is_remote(shard)]
    for path in dict.fromkeys(shard.parent / MANIFEST for shard in local):
        if path.is_file():
            try:
                parse_manifest(path.read_bytes(), str(path))
            except (DataError, OSError) as error:
                detail = f"{error}; it is not used, `clipkit shards index` makes it anew"
                faults.append(Fault(str(path), None, None, "damaged manifest", detail))
    for path, gone in Manifests(log.debug).missing(map(str, shards)):
        detail = f"{label(path)} lists it: {RESTORE}"
        faults += [Fault(label(beside(path, name)), None, None, "missing shard", detail) for name in gone]
    return [fault.to_json() for fault in faults]


@dataclass(frozen=True)
class _Check:
    """One shard: what a process runs."""

    decode: bool

    def __call__(self, shard: str | Path) -> tuple[list[dict[str, Any]], int, bool]:
        """Its faults as JSON, its readable samples, and whether there were checksums if it is remote."""
        if is_remote(shard):
            return self._remote(str(shard))
        return *_found(check_shard(Path(shard), decode=self.decode)), True

    def _remote(self, url: str) -> tuple[list[dict[str, Any]], int, bool]:
        with TemporaryDirectory() as folder:
            copy = Path(folder) / shard_name(url)
            copy.symlink_to(ShardFiles().local(url).absolute())
            for path in (index_path(copy), stats_path(copy)):
                data = read_bytes(beside(url, path.name))
                if data is not None:
                    path.write_bytes(data)
            index, where = check_shard(copy, decode=self.decode), label(beside(url, ""))
            index.faults = [
                replace(fault, shard=label(url), detail=fault.detail.replace(f"{folder}/", where))
                for fault in index.faults
            ]
            return *_found(index), _has_checksums(copy)


def _found(index: ShardIndex) -> tuple[list[dict[str, Any]], int]:
    return [fault.to_json() for fault in index.faults], len(index.samples)


def _has_checksums(shard: Path) -> bool:
    """Whether there is anything beside a shard that its bytes are compared with."""
    try:
        return index_path(shard).exists() or "sha256" in read_stats(shard)
    except (OSError, ValueError):
        return False
