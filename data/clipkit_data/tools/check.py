"""Verifying several shards at once: `check_shard` of each, by several processes, and their manifests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.errors import DataError
from clipkit_data.shards.manifest import MANIFEST, parse_manifest
from clipkit_data.shards.scan import Fault, check_shard
from clipkit_data.tools.job import each, jobs_or_cores


def check_in_processes(
    shards: Sequence[str | Path], *, decode: bool = True, jobs: int | None = None
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Verify shards.

    Args:
        shards: Paths and URLs; what is remote is fetched whole.
        decode: See `check_shard`.
        jobs: Most processes; None is one per core.

    Yields:
        The faults of each shard, as JSON, and its number of readable samples; in order.

    Raises:
        NotFoundError, DataError: A shard is not there or cannot be read.
    """
    return each(_Check(decode), list(shards), jobs_or_cores(jobs))


def check_manifests(shards: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The faults of the manifests in the folders of local shards, as JSON."""
    local = [Path(shard) for shard in shards if "://" not in str(shard)]
    faults = []
    for path in dict.fromkeys(shard.parent / MANIFEST for shard in local):
        if path.is_file():
            try:
                parse_manifest(path.read_bytes(), str(path))
            except (DataError, OSError) as error:
                detail = f"{error}; it is not used, `clipkit shards index` makes it anew"
                faults.append(Fault(str(path), None, None, "damaged manifest", detail).to_json())
    return faults


@dataclass(frozen=True)
class _Check:
    """One shard: what a process runs."""

    decode: bool

    def __call__(self, shard: str | Path) -> tuple[list[dict[str, Any]], int]:
        path = Path(shard)
        if isinstance(shard, str) and "://" in shard:
            from clipkit_data.remote.cache import ShardFiles

            path = ShardFiles().local(shard)
        index = check_shard(path, decode=self.decode)
        return [fault.to_json() | {"shard": str(shard)} for fault in index.faults], len(index.samples)
