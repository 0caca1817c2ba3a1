"""Samples with their captions, decoded: one at a time, in order for evaluation, or all at once.

Evaluation sees every sample once, in the dataset's order. What cannot be read is left out and listed, never
replaced: a figure that says how many it was measured on must mean it.

Shapes: N samples, S side in pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipkit.decode import CropOf
from clipkit.errors import DataError, ImageError
from clipkit.images import Preprocess
from clipkit_data.batches.content import Content, content_for
from clipkit_data.batches.workers import in_workers
from clipkit_data.captions import field_text
from clipkit_data.dataset import ShardDataset
from clipkit_data.lines import LineDataset
from clipkit_data.records import Record, RecordError, SampleFault
from clipkit_data.shards.scan import picture_reason

Dataset = ShardDataset | LineDataset
"""Samples by position: of shards, or of files of sentences."""


class Samples:
    """Decoded samples by position; faults are returned, not raised.

    Args:
        dataset: The samples; a `ShardDataset` or another source of records.
        content: How the content is read.
        captions: Whether an empty caption is a fault.
        more_captions: Metadata fields that must hold a text.
        cache: Keep what was decoded (without the encoded bytes).
    """

    def __init__(
        self,
        dataset: Dataset,
        content: Content,
        *,
        captions: bool,
        more_captions: Sequence[str] = (),
        cache: bool = False,
    ) -> None:
        self.dataset, self.content = dataset, content
        self.captions, self.more_captions, self.cache = captions, more_captions, cache
        self._kept: dict[int, tuple[Any, Record]] = {}
        self._bad: dict[int, SampleFault] = {}

    def load(self, position: int, crop: CropOf | None = None) -> tuple[Any, Record] | SampleFault:
        """The content and the record (without its bytes), or why there is none.

        Args:
            position: In the dataset.
            crop: The box to cut out of the picture; None takes what the preprocessing does.
        """
        if position in self._bad:
            return self._bad[position]
        if position in self._kept:
            return self._kept[position]
        try:
            record = self.dataset[position]
            if self.captions and not record.caption:
                raise RecordError(f"{record.key}: the caption is empty", "empty caption")
            for name in self.more_captions:
                if not field_text(record.meta.get(name), 0):
                    raise RecordError(f"{record.key}: the field {name!r} is empty", f"no {name}")
            found = self.content.load(record, crop), replace(record, image=b"", frames=())
        except (ImageError, RecordError) as error:
            reason = picture_reason(error) if isinstance(error, ImageError) else error.reason
            fault = SampleFault(position, self.dataset.key(position), reason, error.message)
            self._bad[position] = fault
            return fault
        if self.cache:
            self._kept[position] = found
        return found


@dataclass(frozen=True, slots=True)
class Pairs:
    """Consecutive samples of a dataset, faulty ones left out.

    Args:
        images: What the content stacks to: of pictures uint8 (N, 3, S, S), not normalised.
        records: The N records, without the bytes of their content.
        sample_ids: int64 (N,).
        faults: What was left out.
    """

    images: Any
    records: list[Record]
    sample_ids: Tensor
    faults: list[SampleFault]

    @property
    def captions(self) -> list[str]:
        """The N captions; "" where there is none."""
        return [record.caption or "" for record in self.records]


class _PairsMaker:
    """The n-th batch of a dataset in order: what a worker runs."""

    def __init__(self, samples: Samples, batch_size: int, positions: Sequence[int]) -> None:
        self.samples, self.batch_size, self.positions = samples, batch_size, positions

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def make(self, number: int) -> Pairs:
        """The batch of that number."""
        images, records, ids, faults = [], [], [], []
        start = number * self.batch_size
        for position in self.positions[start : start + self.batch_size]:
            found = self.samples.load(position)
            if isinstance(found, SampleFault):
                faults.append(found)
                continue
            images.append(found[0])
            records.append(found[1])
            ids.append(self.samples.dataset.sample_id(position))
        return Pairs(
            self.samples.content.stack(images), records, torch.tensor(ids, dtype=torch.int64), faults
        )


class EvalBatches:
    """Every sample of a dataset once, in order.

    Args:
        dataset: The samples.
        content: How samples are read; a model's preprocessing means pictures as it resizes them.
        batch_size: Samples per batch; batches with faults are smaller.
        workers: Worker processes; 0 decodes in this one.
        limit: Only the first so many samples.
        spread: The limited samples lie evenly in the dataset, instead of at its start.
        captions: Whether a sample with an empty caption is a fault.
    """

    def __init__(
        self,
        dataset: Dataset,
        content: Preprocess | Content,
        *,
        batch_size: int = 256,
        workers: int = 0,
        limit: int | None = None,
        spread: bool = False,
        captions: bool = True,
    ) -> None:
        size = len(dataset) if limit is None else min(limit, len(dataset))
        samples = Samples(dataset, content_for(content), captions=captions)
        positions = [i * len(dataset) // size for i in range(size)] if spread else range(size)
        self._source = _PairsMaker(samples, batch_size, positions)
        self.workers = workers

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._source)

    def __iter__(self) -> Iterator[Pairs]:
        return in_workers(self._source.make, range(len(self)), workers=self.workers)


def load_pairs(
    dataset: Dataset,
    preprocess: Preprocess,
    *,
    workers: int = 0,
    limit: int | None = None,
    captions: bool = True,
) -> Pairs:
    """All samples of a dataset in memory: for evaluation sets that fit. Arguments as in `EvalBatches`.

    Raises:
        DataError: Not one sample can be read.
    """
    parts = list(EvalBatches(dataset, preprocess, workers=workers, limit=limit, captions=captions))
    faults = [fault for part in parts for fault in part.faults]
    if not any(part.records for part in parts):
        raise DataError(f"no sample can be read{f'; the first: {faults[0].detail}' if faults else ''}")
    return Pairs(
        images=torch.cat([part.images for part in parts]),
        records=[record for part in parts for record in part.records],
        sample_ids=torch.cat([part.sample_ids for part in parts]),
        faults=faults,
    )
