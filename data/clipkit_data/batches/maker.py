"""One rank's part of a global batch, made from its number alone: what a loader's worker runs.

The plan says which samples; each is read, cropped, decoded, resized, augmented and tokenized by numbers that
are a function of (seed, epoch, sample id). A sample that cannot be used is replaced by a spare that its own
id names, so every later place stays what it was. A shard that cannot be read at the moment is another
matter: that is tried again and then stops the run, since a spare would make the order depend on the network.

Shapes: B samples, S side in pixels, L tokens, F frames.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from clipkit.decode import CropOf
from clipkit.errors import DataError
from clipkit.text import Tokenizer, trim
from clipkit_data.batches.content import Content, WholePictures
from clipkit_data.batches.order import BatchPlaces, Plan
from clipkit_data.batches.pairs import Dataset, Samples
from clipkit_data.batches.quarantine import BadSample
from clipkit_data.captions import CaptionSampler, draw_captions
from clipkit_data.keyed import Purpose, keyed_integers
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import ViewsConfig, make_views
from clipkit_data.records import Record, SampleFault

MAX_SPARES = 100
_MAX_CACHED_TEXTS = 200_000
_SOURCE_BITS = 56


def _no_numbers() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of one global batch.

    Args:
        images: What the content stacks to: pictures uint8 (B, 3, S, S), not normalised; clips uint8
            (B, F, 3, S, S); a `torch_geometric` batch of B graphs; of texts alone uint8 (B, 0).
        ids: Token ids, int64 (B, L), trimmed to the longest caption; (B, 0) without a tokenizer.
        sample_ids: int64 (B,); equal ids are the same sample.
        epochs: int64 (B,), how often each sample's source was read before.
        step: Number of the global batch.
        first: Row of the global batch that is the first here.
        faults: Samples that were replaced by spares.
        views: Each view of the pictures, uint8 (B, 3, S', S'), where views were asked for.
        index: int64 (B,), each sample's position in all sources joined; (0,) in a stream.
        labels: int64 (B,), equal for equal values of the label field (`label_id`), negative where a sample
            has none; (0,) where no field was named.
        more_ids: Token ids of each further caption field, int64 (B, L').
        ratios: Width / height of each picture before it was squashed, float64 (B,) on the CPU; None where
            `images` are as the model sees them.
    """

    images: Any
    ids: Tensor
    sample_ids: Tensor
    epochs: Tensor
    step: int
    first: int = 0
    faults: tuple[BadSample, ...] = ()
    views: tuple[Tensor, ...] = ()
    index: Tensor = field(default_factory=_no_numbers)
    labels: Tensor = field(default_factory=_no_numbers)
    more_ids: tuple[Tensor, ...] = ()
    ratios: Tensor | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the first sample."""
        return int(self.epochs[0])

    def to(self, device: torch.device | str) -> Self:
        """The batch with what a model reads on a device; copies from pinned memory do not block."""
        return self._each(lambda tensor: tensor.to(device=device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch with what a model reads in page-locked memory; the DataLoader calls it."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        """The batch with all that goes to a model changed alike."""
        single = {name: change(getattr(self, name)) for name in ("images", "ids", "index", "labels")}
        several = {name: tuple(map(change, getattr(self, name))) for name in ("views", "more_ids")}
        return replace(self, **single, **several)

    def checksum(self) -> int:
        """A number in [0, 2^64) whose sum over the ranks' parts, mod 2^64, is the same for the same samples
        in the same rows of the global batch, and else almost never."""
        rows = self.first + np.arange(len(self.sample_ids))
        return int(keyed_integers(0, Purpose.CHECKSUM, rows, self.sample_ids.numpy(), 1).sum())

    def augmented(self, config: AugmentConfig | ViewsConfig, seed: int) -> Self:
        """The batch with its pictures changed, or with views of them, made on the device where they are."""
        keys: dict[str, Any] = {"epoch_N": self.epochs.numpy(), "id_N": self.sample_ids.numpy()}
        keys["ratio_N"] = None if self.ratios is None else self.ratios.numpy()
        if isinstance(config, ViewsConfig):
            return replace(self, views=tuple(make_views(self.images, config, seed=seed, **keys)))
        return replace(self, images=augment(self.images, config, seed=seed, **keys))


class BatchMaker:
    """The batch of one rank at any step.

    Args:
        plan: Which samples a global batch holds.
        datasets: The plan's sources, in its order.
        content: How samples are read.
        tokenizer: None where captions do not count.
        captions: Which words are drawn.
        crop: Random crops of the whole picture, before it is resized.
        augment: How pictures are changed here, or which views are made; None leaves that to others.
        seed: The run's.
        rank, world: Which part of a global batch.
        cache: Keep resized pictures and token ids.
        trim: Cut token ids to the longest caption.
        ahead: How many steps ahead shards are asked for.
        label: Metadata field that says of which class a sample is.
        more_captions: Further caption fields that are tokenized.
    """

    def __init__(
        self,
        plan: Plan,
        datasets: Sequence[Dataset],
        content: Content,
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
        label: str | None,
        more_captions: Sequence[str],
    ) -> None:
        self.content, self.label = content, label
        self.more_captions = [CaptionSampler({name: 1.0}) for name in more_captions]
        self.plan, self.tokenizer, self.captions = plan, tokenizer, captions
        self.crop, self.config, self.seed, self.trim, self.ahead = crop, augment, seed, trim, ahead
        self.sources = [
            Samples(
                dataset, content, captions=tokenizer is not None, more_captions=more_captions, cache=cache
            )
            for dataset in datasets
        ]
        self._first = [0, *accumulate(len(dataset) for dataset in datasets)]
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
        images, records, ids, positions, faults = [], [], [], [], []
        for row, box in enumerate(boxes):
            image, record, found, position = self._sound(places, row, step, int(id_B[row]), box, faults)
            images.append(image)
            records.append(record)
            ids.append(found)
            positions.append(self._first[int(places.source[row])] + position)
        id_B = np.array(ids, dtype=np.int64)
        labels = [label_id(r.meta.get(self.label), id_) for r, id_ in zip(records, ids, strict=True)]
        batch = Batch(
            images=self.content.stack(images),
            ids=self._tokens(records, places.epoch, id_B),
            sample_ids=torch.from_numpy(id_B),
            epochs=torch.from_numpy(places.epoch),
            step=step,
            first=self.part.start,
            faults=tuple(faults),
            index=torch.tensor(positions, dtype=torch.int64),
            ratios=self.content.ratios(images) if isinstance(self.content, WholePictures) else None,
            labels=torch.tensor(labels if self.label else [], dtype=torch.int64),
            more_ids=tuple(
                self._encode(draw_captions(sampler, records, self.seed, places.epoch, id_B))
                for sampler in self.more_captions
            ),
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
    ) -> tuple[Any, Record, int, int]:
        """A row's sample, or the first sound one of the chain of spares that its id names.

        Returns:
            Its content, its record, its id, its position in its source.
        """
        number = int(places.source[row])
        source = self.sources[number]
        starts = self.plan.sources[number].order.starts
        position = int(starts[places.shard[row]] + places.index[row])
        found = source.load(position, box)
        if not isinstance(found, SampleFault):
            return *found, id_, position
        key = np.array([places.epoch[row]]), np.array([id_])
        chain = keyed_integers(self.seed, Purpose.SPARE, *key, MAX_SPARES)[0] % len(source.dataset)
        for spare in chain.tolist():
            faults.append(_bad(found, number, source.dataset, step))
            found = source.load(spare, box)
            if not isinstance(found, SampleFault):
                return *found, (number << _SOURCE_BITS) | source.dataset.sample_id(spare), spare
        raise DataError(
            f"{MAX_SPARES} samples in a row cannot be used; the last: {found.detail}",
            hint="is this the data that the recipe is for? `clipkit shards check` looks for damage",
        )

    def _tokens(self, records: Sequence[Record], epoch_B: np.ndarray, id_B: np.ndarray) -> Tensor:
        """Token ids of one caption per record, int64 (B, L)."""
        if self.tokenizer is None:
            return torch.zeros(len(records), 0, dtype=torch.int64)
        return self._encode(draw_captions(self.captions, records, self.seed, epoch_B, id_B))

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids of texts, int64 (B, L)."""
        assert self.tokenizer is not None
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


def label_id(value: Any, sample_id: int) -> int:
    """A label as a number in [0, 2^63): equal for equal text, and else almost never; no label is −1 − id."""
    if value in (None, ""):
        return ~sample_id
    digest = hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _bad(fault: SampleFault, number: int, dataset: Dataset, step: int) -> BadSample:
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
