"""Verifying several shards at once: `check_shard` of each, by several processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit_data.shards.scan import check_shard
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
