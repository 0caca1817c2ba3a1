"""Labelled pictures as shards, one folder per split: what the known data sets have in common.

A sample is its picture, a `.json` with the label's name under "label", and a `.cls` with the label's number
where it has one. Samples are written as they come, so a data set need not fit into memory.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.errors import ConfigError, DataError
from clipkit.files import atomic_folder
from clipkit_data.records import SampleFault, group_faults
from clipkit_data.shards.writing import Entry, sample_key, shard_name, write_shard
from clipkit_data.tools.indexing import index_shards
from clipkit_data.tools.pack import FAULTS, write_faults

PER_SHARD = 10_000


@dataclass(frozen=True, slots=True)
class Labelled:
    """One picture of a data set.

    Args:
        image: The encoded bytes.
        extension: jpg, png, webp, …
        label: The name of its class; None where nobody labelled it.
        number: The class as the data set counts; None writes no `.cls`.
        more: What else the `.json` says.
    """

    image: bytes
    extension: str
    label: str | None
    number: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, key: str) -> Entry:
        """The sample's members and its row of the table."""
        label = {} if self.label is None else {"label": self.label}
        row = {"key": key, **label, **self.more}
        members = {self.extension: self.image, "json": json.dumps(row, ensure_ascii=False).encode()}
        if self.number is not None:
            members["cls"] = str(self.number).encode()
        return members, row


def write_labelled(samples: Iterable[Labelled], folder: Path, *, per_shard: int = PER_SHARD) -> int:
    """Write samples as the shards of one folder, and return how many there were.

    Raises:
        ConfigError: `per_shard` is below 1.
    """
    if per_shard < 1:
        raise ConfigError(f"samples per shard must be at least 1, got {per_shard}")
    folder.mkdir(parents=True, exist_ok=True)
    rest, written = iter(samples), 0
    for number, first in enumerate(rest):
        name = shard_name(number)
        part = enumerate(chain([first], islice(rest, per_shard - 1)))
        written += write_shard(
            (sample.entry(sample_key(name, place, per_shard)) for place, sample in part), folder, name
        )
    return written


def write_splits(
    splits: Mapping[str, Iterable[Labelled | SampleFault]],
    out: Path,
    *,
    per_shard: int = PER_SHARD,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Write each split to `OUT/SPLIT` with its index; `out` appears whole or not at all.

    Args:
        splits: The samples of each split; a fault is left out, counted and listed in `OUT/faults.jsonl`.
        out: A new folder.
        per_shard: Samples per shard.
        progress: Called with 1 after each sample.

    Returns:
        `{"samples": {split: count}, "faults": {reason: count}, "out": path}`.

    Raises:
        ArtifactError: `out` holds something already.
        DataError: A split has no usable sample.
    """
    faults: list[SampleFault] = []

    def sound(samples: Iterable[Labelled | SampleFault]) -> Iterator[Labelled]:
        for sample in samples:
            if isinstance(sample, SampleFault):
                faults.append(sample)
            else:
                yield sample
            if progress:
                progress(1)

    counts = {}
    with atomic_folder(out) as folder:
        for split, samples in splits.items():
            counts[split] = write_labelled(sound(samples), folder / split, per_shard=per_shard)
            if not counts[split]:
                first = f"; the first fault: {faults[0].detail}" if faults else ""
                raise DataError(f"the split {split!r} has no usable picture{first}")
            index_shards(folder / split)
        write_faults(folder / FAULTS, faults)
    reasons = group_faults([fault.reason for fault in faults])
    return {"samples": counts, "faults": reasons, "out": str(out)}


def png(pixels_HW: np.ndarray) -> bytes:
    """Grey (H, W) or colour (H, W, 3) uint8 pixels as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, "PNG")
    return buffer.getvalue()
