"""One rank's part of a global batch, made from its number alone: what a loader's worker runs.

The plan says which samples; each is read, cropped, decoded, resized, augmented and tokenized by numbers that
are a function of (seed, epoch, sample id). A sample that cannot be used is replaced by a spare that its own
id names, so every later place stays what it was. A shard that cannot be read at the moment is another
matter: that is tried again and then stops the run, since a spare would make the order depend on the network.

Shapes: B pictures, S side in pixels, L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from clipkit.decode import CropOf
from clipkit.errors import DataError
from clipkit.images import Preprocess
from clipkit.text import Tokenizer, trim
from clipkit_data.batches.order import BatchPlaces, Plan
from clipkit_data.batches.pairs import Samples
from clipkit_data.batches.quarantine import BadSample
from clipkit_data.captions import CaptionSampler, draw_captions
from clipkit_data.dataset import ShardDataset
from clipkit_data.keyed import Purpose, keyed_integers
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import ViewsConfig, make_views
from clipkit_data.records import Record, SampleFault

MAX_SPARES = 100
_MAX_CACHED_TEXTS = 200_000
_SOURCE_BITS = 56


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of one global batch.

    Args:
        images: uint8 (B, 3, S, S), not normalised.
        ids: Token ids, int64 (B, L), trimmed to the longest caption; (B, 0) without a tokenizer.
        sample_ids: int64 (B,); equal ids are the same sample.
        epochs: int64 (B,), how often each sample's source was read before.
        step: Number of the global batch.
        first: Row of the global batch that is the first here.
        faults: Samples that were replaced by spares.
        views: Each view of the pictures, uint8 (B, 3, S', S'), where views were asked for.
    """

    images: Tensor
    ids: Tensor
    sample_ids: Tensor
    epochs: Tensor
    step: int
    first: int = 0
    faults: tuple[BadSample, ...] = ()
    views: tuple[Tensor, ...] = ()

    @property
    def epoch(self) -> int:
        """Epoch of the first sample."""
        return int(self.epochs[0])

    def to(self, device: torch.device | str) -> Self:
        """The batch with its pictures and tokens on a device; copies from pinned memory do not block."""
        move = {"device": device, "non_blocking": True}
        views = tuple(view.to(**move) for view in self.views)
        return replace(self, images=self.images.to(**move), ids=self.ids.to(**move), views=views)

    def pin_memory(self) -> Self:
        """The batch with its pictures and tokens in page-locked memory; the DataLoader calls it."""
        views = tuple(view.pin_memory() for view in self.views)
        return replace(self, images=self.images.pin_memory(), ids=self.ids.pin_memory(), views=views)

    def checksum(self) -> int:
        """A number in [0, 2^64) whose sum over the ranks' parts, mod 2^64, is the same for the same samples
        in the same rows of the global batch, and else almost never."""
        rows = self.first + np.arange(len(self.sample_ids))
        return int(keyed_integers(0, Purpose.CHECKSUM, rows, self.sample_ids.numpy(), 1).sum())

    def augmented(self, config: AugmentConfig | ViewsConfig, seed: int) -> Self:
        """The batch with its pictures changed, or with views of them, made on the device where they are."""
        epochs, ids = self.epochs.numpy(), self.sample_ids.numpy()
        if isinstance(config, ViewsConfig):
            return replace(
                self, views=tuple(make_views(self.images, config, seed=seed, epoch_N=epochs, id_N=ids))
            )
        return replace(self, images=augment(self.images, config, seed=seed, epoch_N=epochs, id_N=ids))


class BatchMaker:
    """The batch of one rank at any step.

    Args:
        plan: Which samples a global batch holds.
        datasets: The plan's sources, in its order.
        preprocess: The model's; only its resizing is done here.
        tokenizer: None for pictures alone.
        captions: Which words are drawn.
        crop: Random crops of the whole picture, before it is resized.
        augment: How pictures are changed here, or which views are made; None leaves that to others.
        seed: The run's.
        rank, world: Which part of a global batch.
        cache: Keep resized pictures and token ids.
        trim: Cut token ids to the longest caption.
        ahead: How many steps ahead shards are asked for.
    """

    def __init__(
        self,
        plan: Plan,
        datasets: Sequence[ShardDataset],
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        *,
        captions: CaptionSampler,
        crop: CropConfig | None,
        augment: AugmentConfig | ViewsConfig | None,
        seed: int,
        rank: int,
        world: int,
        cache: bool,
        trim: bool,
        ahead: int,
    ) -> None:
        self.plan, self.tokenizer, self.captions = plan, tokenizer, captions
        self.crop, self.config, self.seed, self.trim, self.ahead = crop, augment, seed, trim, ahead
        self.sources = [
            Samples(dataset, preprocess, captions=tokenizer is not None, cache=cache) for dataset in datasets
        ]
        self.part = slice(rank * plan.batch_size // world, (rank + 1) * plan.batch_size // world)
        self._texts: dict[str, Tensor] = {}

    def places(self, step: int) -> BatchPlaces:
        """This rank's samples of a global batch, before any spare."""
        return self.plan.batch(step)[self.part]

    def make(self, step: int) -> Batch:
        """This rank's part of a global batch."""
        places = self.places(step)
        self._prefetch(step + self.ahead)
        id_B = (places.source << _SOURCE_BITS) | (places.shard << 32) | places.index
        boxes: Sequence[CropOf | None] = [None] * len(id_B)
        if self.crop is not None:
            boxes = self.crop.boxes(seed=self.seed, epoch_n=places.epoch, id_n=id_B)
        images, records, ids, faults = [], [], [], []
        for row, box in enumerate(boxes):
            image, record, found = self._sound(places, row, step, int(id_B[row]), box, faults)
            images.append(image)
            records.append(record)
            ids.append(found)
        id_B, images_B3SS = np.array(ids, dtype=np.int64), torch.stack(images)
        batch = Batch(
            images=images_B3SS,
            ids=self._tokens(records, places.epoch, id_B),
            sample_ids=torch.from_numpy(id_B),
            epochs=torch.from_numpy(places.epoch),
            step=step,
            first=self.part.start,
            faults=tuple(faults),
        )
        return batch if self.config is None else batch.augmented(self.config, self.seed)

    def _prefetch(self, step: int) -> None:
        """Ask for the shards of a later step, where shards must be fetched."""
        if not any(source.dataset.remote for source in self.sources):
            return
        places = self.places(step)
        for number, source in enumerate(self.sources):
            if source.dataset.remote:
                shards = np.unique(places.shard[places.source == number])
                source.dataset.prefetch(shards.tolist())

    def _sound(
        self, places: BatchPlaces, row: int, step: int, id_: int, box: CropOf | None, faults: list[BadSample]
    ) -> tuple[Tensor, Record, int]:
        """A row's sample, or the first sound one of the chain of spares that its id names."""
        number = int(places.source[row])
        source = self.sources[number]
        starts = self.plan.sources[number].order.starts
        position = int(starts[places.shard[row]] + places.index[row])
        found = source.load(position, box)
        if not isinstance(found, SampleFault):
            return *found, id_
        key = np.array([places.epoch[row]]), np.array([id_])
        chain = keyed_integers(self.seed, Purpose.SPARE, *key, MAX_SPARES)[0] % len(source.dataset)
        for spare in chain.tolist():
            faults.append(_bad(found, number, source.dataset, step))
            found = source.load(spare, box)
            if not isinstance(found, SampleFault):
                return *found, (number << _SOURCE_BITS) | source.dataset.sample_id(spare)
        raise DataError(
            f"{MAX_SPARES} samples in a row cannot be read; the last: {found.key}: {found.detail}",
            hint="run `clipkit shards check` on the shards",
        )

    def _tokens(self, records: Sequence[Record], epoch_B: np.ndarray, id_B: np.ndarray) -> Tensor:
        """Token ids of one caption per record, int64 (B, L)."""
        if self.tokenizer is None:
            return torch.zeros(len(records), 0, dtype=torch.int64)
        texts = draw_captions(self.captions, records, self.seed, epoch_B, id_B)
        if self.sources[0].cache:
            ids_BL = self._remembered(texts, self.tokenizer)
        else:
            ids_BL = self.tokenizer.encode(texts)
        return trim(ids_BL, self.tokenizer.pad_id).contiguous() if self.trim else ids_BL

    def _remembered(self, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
        """Token ids of texts, most of which came up before."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(new) > _MAX_CACHED_TEXTS:
            self._texts, new = {}, list(dict.fromkeys(texts))
        if new:
            self._texts.update(zip(new, tokenizer.encode(new), strict=True))
        return torch.stack([self._texts[text] for text in texts])


def _bad(fault: SampleFault, number: int, dataset: ShardDataset, step: int) -> BadSample:
    shard, index = dataset.locate(fault.position)
    return BadSample(
        id=(number << _SOURCE_BITS) | dataset.sample_id(fault.position),
        dataset=dataset.name,
        shard=dataset.shard_names[shard],
        index=index,
        key=fault.key,
        reason=fault.reason,
        detail=fault.detail,
        step=step,
    )
