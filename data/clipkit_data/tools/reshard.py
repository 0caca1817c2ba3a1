"""Shards from shards: chosen samples in a chosen order, every member's bytes as they were.

Nothing is decoded. The members of a sample are read where they lie and written under a new key, the new
shard's number and the place in it, since keys of several sources may be equal. The table beside each new
shard says where its samples came from (`source_shard`, `source_key`); the `.json` inside stays as it was, and
so does a `key` in it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import ConfigError, DataError
from clipkit.files import atomic_write
from clipkit_data.dataset import ShardDataset
from clipkit_data.keyed import epoch_order
from clipkit_data.records import RecordError, group_faults, parse_caption, parse_meta
from clipkit_data.shards.scan import Fault
from clipkit_data.shards.writing import Entry, sample_key, shard_name, write_shard
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.job import Advance, Job, jobs_or_cores, shards_job

FAULTS = "faults.jsonl"


def reshard(
    spec: str | Path,
    out: str | Path,
    *,
    per_shard: int = 10_000,
    shuffle: bool = False,
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Copy samples into new shards of equal size; the folder appears whole or not at all.

    Args:
        spec: Shards, as `resolve_shards` takes them. What `clipkit shards check --quick` reports is left out.
        out: The folder to make; after an interrupted run the same call makes what is missing.
        per_shard: Samples per shard; the last one holds what is left.
        shuffle: Order the samples by a permutation that depends on `seed` alone.
        seed: At least 0.
        jobs: Most processes; None is one per core.
        progress: Called with the number of samples just done.

    Returns:
        `{"samples", "shards", "faults": {reason: count}, "out"}`.

    Raises:
        NotFoundError, DataError: No such shards, or no sound sample in them.
        ArtifactError: `out` holds something already, or was begun with other shards or settings.
    """
    if per_shard < 1 or seed < 0:
        raise ConfigError(
            f"samples per shard must be at least 1 and the seed at least 0, got {per_shard} and {seed}"
        )
    processes = jobs_or_cores(jobs)
    dataset = ShardDataset(resolve_shards(spec), name=str(spec))
    settings = {"command": "reshard", "source": dataset.fingerprint(), "per_shard": per_shard}
    settings |= {"shuffle": shuffle, "seed": seed if shuffle else None}
    with shards_job(out, settings) as job:
        order = epoch_order(seed, 0, len(dataset)) if shuffle else np.arange(len(dataset))
        result = copy_samples(job, dataset, order, per_shard=per_shard, jobs=processes, progress=progress)
    return {**result, "out": str(out)}


def copy_samples(
    job: Job,
    dataset: ShardDataset,
    positions_N: np.ndarray,
    *,
    per_shard: int,
    jobs: int,
    progress: Advance | None = None,
) -> dict[str, Any]:
    """Write the samples at `positions_N`, in that order, as the shards of a job, and its `faults.jsonl`.

    Returns:
        `{"samples", "shards", "faults": {reason: count}}`.

    Raises:
        DataError: Not one could be copied; the job is discarded.
    """
    count = -(-len(positions_N) // per_shard)
    work = _Copy(dataset, positions_N, per_shard, count)
    reports = job.run(work, count, jobs=jobs, advance=progress)
    faults = [fault.to_json() for fault in dataset.faults]
    faults += [fault for report in reports for fault in report["faults"]]
    counts = group_faults([fault["reason"] for fault in faults])
    copied = sum(report["samples"] for report in reports)
    if not copied:
        job.discard()
        words = ", ".join(f"{reason} ×{count}" for reason, count in counts.items())
        raise DataError(f"no sample of {dataset.name} could be copied: {words or 'none was chosen'}")
    if faults:
        lines = [json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults]
        atomic_write(job.folder / FAULTS, "".join(lines).encode("utf-8", "backslashreplace"))
    shards = sum(report["samples"] > 0 for report in reports)
    return {"samples": copied, "shards": shards, "faults": counts}


@dataclass(frozen=True)
class _Copy:
    """One new shard."""

    dataset: ShardDataset
    positions_N: np.ndarray
    per_shard: int
    count: int

    def __call__(self, folder: Path, number: int, advance: Advance | None) -> dict[str, Any]:
        name = shard_name(number, self.count)
        span = self.positions_N[number * self.per_shard : (number + 1) * self.per_shard]
        faults: list[dict[str, Any]] = []
        written = write_shard(self._entries(name, span, faults, advance), folder, name)
        return {"rows": len(span), "samples": written, "faults": faults}

    def _entries(
        self, name: str, span: np.ndarray, faults: list[dict[str, Any]], advance: Advance | None
    ) -> Iterator[Entry]:
        place, names = 0, self.dataset.shard_names
        for position in map(int, span):
            shard, key = names[self.dataset.locate(position)[0]], self.dataset.key(position)
            try:
                members = read_members(self.dataset, position)
                own = {"key": sample_key(name, place, self.per_shard), "status": "success"}
                yield members, own | _row(members) | own | {"source_shard": shard, "source_key": key}
                place += 1
            except RecordError as error:
                faults.append(Fault(shard, key, None, error.reason, error.message).to_json())
            if advance:
                advance(1)


def read_members(dataset: ShardDataset, position: int) -> dict[str, bytes]:
    """All members of a sample by extension, as they lie in the shard. Raises: RecordError, DataError."""
    members = dataset.members(position)
    if "" in members:  # webdataset's writer knows no such member
        raise RecordError(f"{dataset.key(position)}: a member has no extension", "member name")
    return members


def _row(members: dict[str, bytes]) -> dict[str, Any]:
    """What the table beside a shard says of a sample: its caption and the fields of its `.json`."""
    row: dict[str, Any] = {}
    try:
        row = parse_meta(members["json"], "json") if "json" in members else row
        return row | ({"caption": parse_caption(members["txt"], "txt")} if "txt" in members else {})
    except RecordError:  # such bytes are copied like any others
        return row
