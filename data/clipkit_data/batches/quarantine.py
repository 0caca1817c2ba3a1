"""Samples that could not be used in training: each listed once, and too many stop the run.

A sample that cannot be decoded is replaced by a spare, so that every later place stays what it was; here is
the list of those that were. It is saved with a run's checkpoints as `quarantine.jsonl`, a line each.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from clipkit.errors import ArtifactError, DataError
from clipkit.files import atomic_write
from clipkit_data.records import group_faults

FILE = "quarantine.jsonl"
_LEAST = 20  # a handful of bad samples at the start of a run says nothing about their share


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was replaced.

    Args:
        id: Its sample id.
        dataset: The name of its dataset.
        shard: The name of its shard.
        index: Its place among the shard's sound samples.
        key: Its key.
        reason: One of a few fixed phrases.
        detail: The whole message.
        step: Number of the global batch that wanted it first.
    """

    id: int
    dataset: str
    shard: str
    index: int
    key: str
    reason: str
    detail: str
    step: int


class Quarantine:
    """The bad samples that came up so far.

    Args:
        max_share: Largest share of the samples read here that may be bad, once there are more than 20;
            with 0 the first one is too many.
        known: Bad samples of an earlier part of the run; they do not count again.
    """

    def __init__(self, max_share: float = 1.0, known: Iterable[BadSample] = ()) -> None:
        self.max_share = max_share
        self.samples = {bad.id: bad for bad in known}
        self._earlier, self._read = len(self.samples), 0

    def add(self, found: Iterable[BadSample], read: int) -> None:
        """Take in what one batch of `read` samples found.

        Raises:
            DataError: More bad samples than `max_share` allows, with what they are.
        """
        self._read += read
        for bad in found:
            self.samples.setdefault(bad.id, bad)
        fresh = list(self.samples.values())[self._earlier :]
        least = _LEAST if self.max_share else 0
        if len(fresh) > max(least, self.max_share * self._read):
            counts = group_faults([bad.reason for bad in fresh])
            words = ", ".join(f"{reason} ×{count}" for reason, count in counts.items())
            first = fresh[0]
            raise DataError(
                f"{len(fresh)} of {self._read} samples cannot be used, more than the {self.max_share:.1%} "
                f"that are allowed: {words}; the first: {first.shard}: {first.key}: {first.detail}",
                hint="run `clipkit shards check` on the shards, or raise data.max_bad",
            )

    def counts(self) -> dict[str, int]:
        """How many there are, by reason."""
        return group_faults([bad.reason for bad in self.samples.values()])


def write_quarantine(path: Path, samples: Iterable[BadSample]) -> None:
    """One line of JSON a sample, by id; no file when there is none."""
    lines = [json.dumps(asdict(bad), ensure_ascii=False) for bad in sorted(samples, key=lambda bad: bad.id)]
    if lines:
        atomic_write(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    else:
        path.unlink(missing_ok=True)


def read_quarantine(path: Path) -> list[BadSample]:
    """What `write_quarantine` wrote; empty where there is no file. Raises: ArtifactError."""
    if not path.is_file():
        return []
    try:
        return [BadSample(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is no list of bad samples: {error}") from error
