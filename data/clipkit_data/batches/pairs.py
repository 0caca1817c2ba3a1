"""Pictures with their captions, decoded: one at a time, in order for evaluation, or all at once.

Evaluation sees every sample once, in the dataset's order. What cannot be read is left out and listed, never
replaced: a figure that says how many it was measured on must mean it.

Shapes: N samples, S side in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipkit.decode import CropOf, read_picture
from clipkit.errors import DataError, ImageError
from clipkit.images import Preprocess
from clipkit_data.batches.workers import in_workers
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import Record, RecordError, SampleFault
from clipkit_data.shards.scan import picture_reason


def load_picture(record: Record, preprocess: Preprocess, crop: CropOf | None = None) -> Tensor:
    """A record's picture as uint8 (3, S, S). Raises: ImageError."""
    return read_picture(record.image, preprocess, name=record.key, crop=crop)


class Samples:
    """Decoded samples by position; faults are returned, not raised.

    Args:
        dataset: The samples; a `ShardDataset` or another source of records.
        preprocess: Says how pictures are resized.
        captions: Whether an empty caption is a fault.
        cache: Keep what was decoded (without the encoded bytes).
    """

    def __init__(
        self, dataset: ShardDataset, preprocess: Preprocess, *, captions: bool, cache: bool = False
    ) -> None:
        self.dataset, self.preprocess = dataset, preprocess
        self.captions, self.cache = captions, cache
        self._kept: dict[int, tuple[Tensor, Record]] = {}
        self._bad: dict[int, SampleFault] = {}

    def load(self, position: int, crop: CropOf | None = None) -> tuple[Tensor, Record] | SampleFault:
        """The picture uint8 (3, S, S) and the record (its `image` emptied), or why there is none.

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
            found = load_picture(record, self.preprocess, crop), replace(record, image=b"")
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
        images: uint8 (N, 3, S, S), not normalised.
        records: The N records, without their pictures' bytes.
        sample_ids: int64 (N,).
        faults: What was left out.
    """

    images: Tensor
    records: list[Record]
    sample_ids: Tensor
    faults: list[SampleFault]

    @property
    def captions(self) -> list[str]:
        """The N captions; "" where there is none."""
        return [record.caption or "" for record in self.records]


class _PairsMaker:
    """The n-th batch of a dataset in order: what a worker runs."""

    def __init__(self, samples: Samples, batch_size: int, limit: int) -> None:
        self.samples, self.batch_size, self.limit = samples, batch_size, limit

    def __len__(self) -> int:
        return -(-self.limit // self.batch_size)

    def make(self, number: int) -> Pairs:
        """The batch of that number."""
        images, records, ids, faults = [], [], [], []
        side = self.samples.preprocess.size
        start = number * self.batch_size
        for position in range(start, min(start + self.batch_size, self.limit)):
            found = self.samples.load(position)
            if isinstance(found, SampleFault):
                faults.append(found)
                continue
            images.append(found[0])
            records.append(found[1])
            ids.append(self.samples.dataset.sample_id(position))
        stacked = torch.stack(images) if images else torch.zeros(0, 3, side, side, dtype=torch.uint8)
        return Pairs(stacked, records, torch.tensor(ids, dtype=torch.int64), faults)


class EvalBatches:
    """Every sample of a dataset once, in order.

    Args:
        dataset: The samples.
        preprocess: The model's; only its resizing is done here.
        batch_size: Samples per batch; batches with faults are smaller.
        workers: Worker processes; 0 decodes in this one.
        limit: Only the first so many samples.
        captions: Whether a sample with an empty caption is a fault.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        preprocess: Preprocess,
        *,
        batch_size: int = 256,
        workers: int = 0,
        limit: int | None = None,
        captions: bool = True,
    ) -> None:
        size = len(dataset) if limit is None else min(limit, len(dataset))
        self._source = _PairsMaker(Samples(dataset, preprocess, captions=captions), batch_size, size)
        self.workers = workers

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._source)

    def __iter__(self) -> Iterator[Pairs]:
        return in_workers(self._source.make, range(len(self)), workers=self.workers)


def load_pairs(
    dataset: ShardDataset,
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
