"""What shards hold, in numbers: pictures, sizes, captions, duplicates, faults.

Every sample is read once, by several processes; of each only a few numbers and two digests of 16 bytes are
kept. Duplicates are exact: equal bytes of the picture (of all frames, of the video, of the graph), equal
caption. What a sample does not have, such as the width of a graph, is not counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit_data.dataset import ShardDataset
from clipkit_data.records import RecordError, group_faults
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.columns import columns_of, digest
from clipkit_data.tools.job import each_block, jobs_or_cores

QUANTITIES = ("width", "height", "aspect", "bytes", "words", "characters")
_SHARES = {"min": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1.0}
_MOST = 3  # of the most frequent duplicates, how many are named


@dataclass(frozen=True)
class Statistics:
    """The numbers of some shards.

    Args:
        summary: What `clipkit shards stats --json` prints.
        values: Each of `QUANTITIES`, float64 (N,): one value per sample that has it; of the last two, one per
            caption. `bytes` are those of the picture, the frames, the video or the graph.
    """

    summary: dict[str, Any]
    values: dict[str, np.ndarray]


def shard_statistics(
    spec: str | Path | Sequence[str | Path],
    *,
    jobs: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Statistics:
    """Read all samples and count.

    Args:
        spec: Shards, as `resolve_shards` takes them.
        jobs: Most processes; None is one per core.
        progress: Called with the number of samples just read.

    Raises:
        NotFoundError, DataError: No such shards, or no sound sample in them.
    """
    processes = jobs_or_cores(jobs)
    paths = resolve_shards(spec)
    dataset = ShardDataset(paths, name=str(spec))
    blocks = []
    for block in each_block(_Look(dataset), len(dataset), processes):
        blocks.append(block)
        if progress:
            progress(len(block.positions) + len(block.faults))
    values = {name: np.concatenate([block.values[name] for block in blocks]) for name in QUANTITIES}
    captioned, pictured = values["characters"] > 0, np.isfinite(values["bytes"])
    for name in QUANTITIES:
        known = captioned if name in ("words", "characters") else np.isfinite(values[name])
        values[name] = values[name][known]
    positions = np.concatenate([block.positions for block in blocks])
    captions = np.concatenate([block.captions for block in blocks])
    pictures = np.concatenate([block.pictures for block in blocks])
    faults = [fault.reason for fault in dataset.faults] + [reason for b in blocks for reason in b.faults]
    summary = {
        "shards": len(paths),
        "samples": len(dataset),
        "bytes": sum(shard["bytes"] for shard in dataset.manifest()),
        "formats": dict(sum((block.formats for block in blocks), Counter()).most_common()),
        "per_sample": {name: _quantiles(values[name]) for name in QUANTITIES},
        "empty_captions": int((~captioned).sum()),
        "duplicate_captions": _duplicates(captions[captioned], positions[captioned], dataset, caption=True),
        "duplicate_pictures": _duplicates(pictures[pictured], positions[pictured], dataset, caption=False),
        "faults": group_faults(faults),
    }
    return Statistics(summary, values)


@dataclass
class _Block:
    """The numbers of consecutive samples, NaN for none; those with a fault are in `faults` alone."""

    positions: np.ndarray
    values: dict[str, np.ndarray]
    captions: np.ndarray
    pictures: np.ndarray
    formats: Counter[str]
    faults: list[str]


@dataclass(frozen=True)
class _Look:
    """The numbers of a range of samples: what a process runs."""

    dataset: ShardDataset

    def __call__(self, span: tuple[int, int]) -> _Block:
        rows, positions, faults = [], [], []
        for position in range(*span):
            try:
                rows.append(columns_of(self.dataset[position]))
                positions.append(position)
            except RecordError as error:
                faults.append(error.reason)
        return _Block(
            np.array(positions, dtype=np.int64),
            {name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in QUANTITIES},
            np.array([digest(row.caption.encode()) for row in rows], dtype="V16"),
            np.array([row.picture or b"" for row in rows], dtype="V16"),
            Counter(row.format for row in rows if row.format),
            faults,
        )


def _quantiles(values_N: np.ndarray) -> dict[str, float] | None:
    """Mean and quantiles; None of nothing."""
    if not len(values_N):
        return None
    quantiles = np.quantile(values_N, list(_SHARES.values()))
    found = dict(zip(_SHARES, map(float, quantiles), strict=True))
    return {"mean": float(values_N.mean()), **found}


def _duplicates(
    digests_N: np.ndarray, positions_N: np.ndarray, dataset: ShardDataset, *, caption: bool
) -> dict[str, Any]:
    """How many samples repeat an earlier one, and which are repeated most often."""
    _, first_G, count_G = np.unique(digests_N, return_index=True, return_counts=True)
    order_G = np.lexsort((first_G, -count_G))[:_MOST]
    most = []
    for group in order_G[count_G[order_G] > 1]:
        position = int(positions_N[first_G[group]])
        shown = dataset[position].caption if caption else dataset.key(position)
        most.append({"caption" if caption else "key": shown, "times": int(count_G[group])})
    return {"samples": len(digests_N) - len(count_G), "most_frequent": most}
