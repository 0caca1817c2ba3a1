"""Training batches whose content is a function of the step number alone.

`clipkit_data.batches.order` says which samples a global batch holds, `clipkit_data.batches.maker` makes a
rank's part of it. Here the two are put to work: workers make whole batches from step numbers, so their
number changes nothing but speed; every rank has a batch at every step, no epoch's tail is dropped, and the
whole state of reading is one integer.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np

from clipkit.errors import ConfigError, InputError
from clipkit.images import Preprocess
from clipkit.text import Tokenizer
from clipkit_data.batches.content import Content, content_for
from clipkit_data.batches.maker import Batch, BatchMaker
from clipkit_data.batches.order import VERSION, Order, Plan, Source
from clipkit_data.batches.pairs import Dataset
from clipkit_data.batches.quarantine import BadSample, Quarantine
from clipkit_data.batches.workers import in_workers
from clipkit_data.captions import CaptionSampler
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import ViewsConfig

__all__ = ["Batch", "TrainBatches"]

LARGE = 1_000_000  # samples; beyond, an epoch is shuffled by windows
_LANES, _WINDOW = 64, 8192


class TrainBatches:
    """An endless run of training batches for one rank; iterating again starts at `start_step` again.

    Args:
        datasets: The samples: one source, or several that are mixed.
        content: How samples are read; a model's preprocessing means pictures as it resizes them.
        tokenizer: The model's; None where captions do not count.
        batch_size: Global batch size, over all ranks.
        weights: How often each source is read, relative to the others; by default as large as it is.
        seed: Fixes the order, the augmentation, the captions and the spares.
        lanes, window: See `clipkit_data.batches.order`. By default one lane that is shuffled as a whole for
            sources of up to a million samples, else 64 lanes with windows of 8,192.
        rank, world: This process and the number of processes.
        workers: Worker processes; 0 makes batches in this one. Changes nothing but speed.
        captions: Which words are drawn; None takes each sample's caption.
        crop: Random crops of the whole picture before it is resized; None takes the centre.
        augment: How pictures are changed once they are resized, or which views are made of them; None leaves
            them alone, or to `Batch.augmented` on another device.
        cache: Keep resized pictures and token ids in memory (in each worker): for sets that fit.
        start_step: The first global batch, for resuming.
        trim: Cut token ids to the longest caption of the batch; wrong for towers that read padding.
        pin_memory: Page-locked batches, for copies to a GPU.
        max_bad: Largest share of samples that may turn out bad.
        known_bad: Bad samples that an earlier part of the run found.
        label: Metadata field that says of which class a sample is; a sample without it has one of its own.
        more_captions: Further caption fields that are tokenized; a sample without one is bad.

    Attributes:
        quarantine: Samples of this rank that were replaced by spares.

    Raises:
        ConfigError: A batch that the ranks cannot share, a rank outside the world, a negative seed.
        InputError: A tokenizer, but no captions in a dataset; more captions, but no tokenizer.
    """

    def __init__(
        self,
        datasets: Dataset | Sequence[Dataset],
        content: Preprocess | Content,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        lanes: int | None = None,
        window: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        captions: CaptionSampler | None = None,
        crop: CropConfig | None = None,
        augment: AugmentConfig | ViewsConfig | None = None,
        cache: bool = False,
        start_step: int = 0,
        trim: bool = True,
        pin_memory: bool = False,
        max_bad: float = 1.0,
        known_bad: Sequence[BadSample] = (),
        label: str | None = None,
        more_captions: Sequence[str] = (),
    ) -> None:
        if not 0 <= rank < world or batch_size < world:
            raise ConfigError(f"batch_size {batch_size} cannot be shared: rank {rank} of {world} processes")
        if workers < 0 or start_step < 0:
            raise ConfigError(f"workers {workers}, start_step {start_step}: at least 0 each")
        if cache and crop is not None:
            raise ConfigError("cache keeps resized pictures: it cannot go with random crops of whole ones")
        if more_captions and tokenizer is None:
            raise InputError("more_captions are for models that read texts")
        self.datasets = list(datasets) if isinstance(datasets, Sequence) else [datasets]
        for dataset in self.datasets:
            if tokenizer is not None and not dataset.has_captions:
                raise InputError(f"{dataset.name} has no captions (.txt) to train on")
        self.plan = _plan(self.datasets, weights, batch_size, seed, lanes, window)
        self._maker = BatchMaker(
            self.plan,
            self.datasets,
            content_for(content),
            tokenizer,
            captions=captions or CaptionSampler(),
            crop=crop,
            augment=augment,
            seed=seed,
            rank=rank,
            world=world,
            cache=cache,
            trim=trim,
            ahead=2 * max(workers, 1),
            label=label,
            more_captions=more_captions,
        )
        self.samples, self.batch_size = sum(len(dataset) for dataset in self.datasets), batch_size
        self.start_step, self.workers, self.pin_memory = start_step, workers, pin_memory
        self.quarantine = Quarantine(max_bad, known_bad)

    @property
    def steps_per_epoch(self) -> float:
        """Global batches per epoch; not rounded, because no tail is dropped."""
        return self.samples / self.batch_size

    def positions(self, step: int) -> np.ndarray:
        """Positions of this rank's samples at a step, before any spare, int64 (B,), each in its dataset."""
        places = self._maker.places(step)
        starts = [source.order.starts for source in self.plan.sources]
        rows = zip(places.source, places.shard, places.index, strict=True)
        return np.array([starts[source][shard] + index for source, shard, index in rows], dtype=np.int64)

    def digest(self) -> str:
        """SHA-256 over all that decides the order: with equal digests each step reads the same samples."""
        shares = [str(share) for share in self.plan.mixture.shares]
        sources = [
            [dataset.fingerprint(), share, source.order.lanes, source.order.window]
            for dataset, share, source in zip(self.datasets, shares, self.plan.sources, strict=True)
        ]
        seed = self.plan.sources[0].order.seed
        line: list[Any] = [VERSION, seed, self.batch_size, sources]
        return hashlib.sha256(json.dumps(line).encode()).hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        steps = count(self.start_step)
        for batch in in_workers(self._maker.make, steps, workers=self.workers, pin_memory=self.pin_memory):
            self.quarantine.add(batch.faults, len(batch.sample_ids))
            yield batch


def _plan(
    datasets: Sequence[Dataset],
    weights: Sequence[float] | None,
    batch_size: int,
    seed: int,
    lanes: int | None,
    window: int | None,
) -> Plan:
    """The order of batches. Source s has seed + s, so that two equal sources are not read in step."""
    if weights is None:
        weights = [len(dataset) for dataset in datasets]
    if len(weights) != len(datasets):
        raise ConfigError(f"{len(weights)} weights for {len(datasets)} sources")
    sources = []
    for number, (dataset, weight) in enumerate(zip(datasets, weights, strict=True)):
        small = len(dataset) <= LARGE
        order = Order(
            dataset.sizes,
            seed=seed + number if seed >= 0 else seed,
            lanes=lanes or (1 if small else _LANES),
            window=window or (max(1, len(dataset)) if small else _WINDOW),
        )
        sources.append(Source(order, weight))
    return Plan(sources, batch_size)
