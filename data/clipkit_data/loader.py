"""Training batches whose content is a function of the step number alone.

Epochs are permutations by (seed, epoch), laid end to end; global batch b is the positions
[b·B, (b + 1)·B) of that line, and rank r takes its contiguous part. Nothing is dropped at an epoch's end,
every rank has a batch at every step, and the whole state of reading is one integer. A worker makes whole
batches from step numbers, so their number changes nothing but speed.

A sample that cannot be read is replaced by a spare that its own key names, and reported with the batch.

Shapes: B pictures, S side in pixels, L tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Self

import numpy as np
import torch
from torch import Tensor

from clipkit.errors import ConfigError, DataError, InputError
from clipkit.images import Preprocess
from clipkit.text import Tokenizer, trim
from clipkit_data.augment import AugmentConfig, augment
from clipkit_data.captions import CaptionSampler
from clipkit_data.dataset import ShardDataset
from clipkit_data.keyed import Purpose, epoch_order, keyed_integers, keyed_uniforms
from clipkit_data.pairs import Samples
from clipkit_data.records import Record, SampleFault, group_faults
from clipkit_data.workers import in_workers

MAX_SPARES = 100
_MAX_CACHED_TEXTS = 200_000


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of one global batch.

    Args:
        images: uint8 (B, 3, S, S), not normalised.
        ids: Token ids, int64 (B, L), trimmed to the longest caption; (B, 0) without a tokenizer.
        sample_ids: int64 (B,); equal ids are the same sample.
        epoch: Epoch of the first sample.
        step: Number of the global batch.
        faults: Samples that were replaced by spares.
    """

    images: Tensor
    ids: Tensor
    sample_ids: Tensor
    epoch: int
    step: int
    faults: tuple[SampleFault, ...] = ()

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device; copies from pinned memory do not block."""
        move = {"device": device, "non_blocking": True}
        return replace(
            self,
            images=self.images.to(**move),
            ids=self.ids.to(**move),
            sample_ids=self.sample_ids.to(**move),
        )

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; the DataLoader calls it."""
        return replace(
            self,
            images=self.images.pin_memory(),
            ids=self.ids.pin_memory(),
            sample_ids=self.sample_ids.pin_memory(),
        )


class _BatchMaker:
    """The batch of one rank at any step: what a worker runs."""

    def __init__(
        self,
        samples: Samples,
        tokenizer: Tokenizer | None,
        captions: CaptionSampler,
        config: AugmentConfig | None,
        *,
        batch_size: int,
        seed: int,
        part: slice,
        trim: bool,
    ) -> None:
        self.samples, self.tokenizer, self.captions, self.config = samples, tokenizer, captions, config
        self.batch_size, self.seed, self.part, self.trim = batch_size, seed, part, trim
        self._orders: dict[int, np.ndarray] = {}
        self._texts: dict[str, Tensor] = {}

    def positions(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and dataset positions of this rank's samples at a step, int64 (B,) each."""
        size = len(self.samples.dataset)
        line = step * self.batch_size + np.arange(self.part.start, self.part.stop, dtype=np.int64)
        epochs = line // size
        wanted = range(int(epochs[0]), int(epochs[-1]) + 1)
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else epoch_order(self.seed, epoch, size)
            for epoch in wanted
        }
        places = [self._orders[int(epoch)][place] for epoch, place in zip(epochs, line % size, strict=True)]
        return epochs, np.array(places, dtype=np.int64)

    def make(self, step: int) -> Batch:
        """This rank's part of a global batch."""
        epochs, positions = self.positions(step)
        images, records, ids, faults = [], [], [], []
        for epoch, position in zip(epochs.tolist(), positions.tolist(), strict=True):
            image, record, position = self._sound(epoch, position, faults)
            images.append(image)
            records.append(record)
            ids.append(self.samples.dataset.sample_id(position))
        id_N = np.array(ids, dtype=np.int64)
        images_N3SS = torch.stack(images)
        if self.config is not None:
            images_N3SS = augment(images_N3SS, self.config, seed=self.seed, epoch_N=epochs, id_N=id_N)
        return Batch(
            images=images_N3SS,
            ids=self._tokens(records, epochs, id_N),
            sample_ids=torch.from_numpy(id_N),
            epoch=int(epochs[0]),
            step=step,
            faults=tuple(faults),
        )

    def _sound(self, epoch: int, position: int, faults: list[SampleFault]) -> tuple[Tensor, Record, int]:
        """The sample at a position, or the first sound one of the chain of spares that its key names."""
        found = self.samples.load(position)
        if not isinstance(found, SampleFault):
            return *found, position
        key = np.array([epoch]), np.array([self.samples.dataset.sample_id(position)])
        chain = keyed_integers(self.seed, Purpose.SPARE, *key, MAX_SPARES)[0] % len(self.samples.dataset)
        for spare in chain.tolist():
            faults.append(found)
            found = self.samples.load(spare)
            if not isinstance(found, SampleFault):
                return *found, spare
        raise DataError(
            f"{MAX_SPARES} samples in a row cannot be read; the last: {found.key}: {found.detail}",
            hint="run `clipkit shards check` on the shards",
        )

    def _tokens(self, records: Sequence[Record], epoch_N: np.ndarray, id_N: np.ndarray) -> Tensor:
        """Token ids of one caption per record, int64 (B, L)."""
        if self.tokenizer is None:
            return torch.zeros(len(records), 0, dtype=torch.int64)
        draws = keyed_uniforms(self.seed, Purpose.CAPTION, epoch_N, id_N, self.captions.draws).tolist()
        texts = [self.captions.draw(record, draw) for record, draw in zip(records, draws, strict=True)]
        if not self.samples.cache:
            ids_NL = self.tokenizer.encode(texts)
        else:
            ids_NL = self._remembered(texts, self.tokenizer)
        return trim(ids_NL, self.tokenizer.pad_id).contiguous() if self.trim else ids_NL

    def _remembered(self, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
        """Token ids of texts, most of which came up before."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(new) > _MAX_CACHED_TEXTS:
            self._texts, new = {}, list(dict.fromkeys(texts))
        if new:
            self._texts.update(zip(new, tokenizer.encode(new), strict=True))
        return torch.stack([self._texts[text] for text in texts])


class TrainBatches:
    """An endless run of training batches for one rank; iterating again starts at `start_step` again.

    Args:
        dataset: The samples.
        preprocess: The model's; only its resizing is done here.
        tokenizer: The model's; None for pictures alone.
        batch_size: Global batch size, over all ranks.
        seed: Fixes the order, the augmentation, the captions and the spares.
        rank, world: This process and the number of processes.
        workers: Worker processes; 0 makes batches in this one. Changes nothing but speed.
        captions: Which words are drawn; None takes each sample's caption.
        augment: How pictures are changed; None leaves them alone.
        cache: Keep resized pictures and token ids in memory (in each worker): for sets that fit.
        start_step: The first global batch, for resuming.
        trim: Cut token ids to the longest caption of the batch; wrong for towers that read padding.
        pin_memory: Page-locked batches, for copies to a GPU.

    Attributes:
        faults: Samples of this rank that were replaced by spares, each once, in the order of their coming.

    Raises:
        ConfigError: A batch that the ranks cannot share, a rank outside the world, a negative seed.
        InputError: A tokenizer, but no captions in the dataset.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        captions: CaptionSampler | None = None,
        augment: AugmentConfig | None = None,
        cache: bool = False,
        start_step: int = 0,
        trim: bool = True,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world or batch_size < world:
            raise ConfigError(f"batch_size {batch_size} cannot be shared: rank {rank} of {world} processes")
        if seed < 0 or workers < 0 or start_step < 0:
            raise ConfigError(f"seed {seed}, workers {workers}, start_step {start_step}: at least 0 each")
        if tokenizer is not None and not dataset.has_captions:
            raise InputError(f"{dataset.name} has no captions (.txt) to train on")
        part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._source = _BatchMaker(
            Samples(dataset, preprocess, captions=tokenizer is not None, cache=cache),
            tokenizer,
            captions or CaptionSampler(),
            augment,
            batch_size=batch_size,
            seed=seed,
            part=part,
            trim=trim,
        )
        self.samples, self.batch_size, self.start_step = len(dataset), batch_size, start_step
        self.workers, self.pin_memory = workers, pin_memory
        self.faults: list[SampleFault] = []

    @property
    def steps_per_epoch(self) -> float:
        """Global batches per epoch; not rounded, because no tail is dropped."""
        return self.samples / self.batch_size

    def fault_counts(self) -> dict[str, int]:
        """How many samples of this rank were replaced, by reason."""
        return group_faults([fault.reason for fault in self.faults])

    def positions(self, step: int) -> np.ndarray:
        """Dataset positions of this rank's samples at a step, before any spare, int64 (B,)."""
        return self._source.positions(step)[1]

    def __iter__(self) -> Iterator[Batch]:
        known = {fault.position for fault in self.faults}
        steps = count(self.start_step)
        for batch in in_workers(self._source.make, steps, workers=self.workers, pin_memory=self.pin_memory):
            for fault in batch.faults:
                if fault.position not in known:
                    known.add(fault.position)
                    self.faults.append(fault)
            yield batch
