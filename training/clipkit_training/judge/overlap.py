"""Samples that two data sets share, so that none counts twice and a report can say that they overlap.

Shards of one digest hold the same samples (`clipkit_training.evaluate.shard_digests`); those that were packed
again into other shards are not recognised.
"""

from collections.abc import Sequence

from clipkit_data.batches.pairs import Dataset
from clipkit_data.records import Record
from clipkit_training.evaluate import shard_digests


class Overlap:
    """Which samples of some data sets are in several of their shards.

    Args:
        datasets: The training part, and the held-out part if there is one.
    """

    def __init__(self, *datasets: Dataset) -> None:
        self._digests = [shard_digests(data) for data in datasets]

    def in_training(self, heldout: Sequence[Record]) -> int:
        """How many held-out samples the training part has, too."""
        train = set(self._digests[0])
        known = {number for number, digest in enumerate(self._digests[-1]) if digest in train}
        return sum(record.id[0] in known for record in heldout)

    def once(self, parts: Sequence[Sequence[Record]]) -> list[int]:
        """Places, in all parts one after the other, at which each sample stands for the first time."""
        first: dict[str, tuple[int, int]] = {}
        for part, digests in enumerate(self._digests):
            for shard, digest in enumerate(digests):
                first.setdefault(digest, (part, shard))
        fresh = [
            first[self._digests[part][record.id[0]]] == (part, record.id[0])
            for part, records in enumerate(parts)
            for record in records
        ]
        return [place for place, new in enumerate(fresh) if new]
