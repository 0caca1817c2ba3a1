"""Shards read as one endless stream, by webdataset's own stages: quick to start, and declared not exact.

For `pipe:COMMAND` and `stream:SHARDS`. Every worker of every rank draws shards with replacement, reads each
from front to back and mixes samples in a buffer, so there is always a next batch and the number of shards
does not matter. What is given up: some samples come twice before others come once, another number of workers
is another order, and a run that resumes begins a new stream. What is not given up is knowing of losses:
`clipkit_data.shards.tar_stream` reads the shards, and what is left out comes with the next batch.

Shapes: B pictures, S side in pixels, L tokens.
"""

import logging
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from webdataset.filters import shuffle as shuffle_stage
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards

from clipkit.errors import ConfigError, DataError, ImageError
from clipkit.images import Preprocess
from clipkit.text import Tokenizer, trim
from clipkit_data.batches.content import Pictures
from clipkit_data.batches.loader import Batch
from clipkit_data.batches.quarantine import BadSample, Quarantine
from clipkit_data.batches.workers import in_workers
from clipkit_data.captions import CaptionSampler, draw_captions
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.records import Record, RecordError
from clipkit_data.remote.storage import Retry, shown
from clipkit_data.shards.scan import picture_reason
from clipkit_data.shards.tar_stream import StreamFault, StreamSample, read_shard, stream_id
from clipkit_data.sources import expand_braces, resolve_shards

log = logging.getLogger("clipkit_data")
MAX_BAD_SAMPLES = 100
MAX_BAD_SHARDS = 10


def stream_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """The paths, URLs and commands of a stream.

    Args:
        spec: `pipe:COMMAND` (braces are written out), `stream:SHARDS`, shards alone, or several of these.

    Raises:
        NotFoundError: No such shards.
        InputError: The braces do not match, or a server cannot list.
    """
    if not isinstance(spec, str | Path):
        return [shard for part in spec for shard in stream_shards(part)]
    text = str(spec).removeprefix("stream:")
    if text.startswith("pipe:"):
        return expand_braces(text)
    return [str(shard) for shard in resolve_shards(text)]


@dataclass(frozen=True, slots=True)
class _Stream:
    """Which samples a worker's stream holds, and where it stands among its like."""

    shards: list[str]
    name: str
    seed: int
    rank: int
    start_step: int
    shuffle: int
    steps_per_epoch: float | None
    retry: Retry

    def epoch(self, step: int) -> int:
        """The epoch of a step; without a named epoch every step is one, and nothing is drawn twice alike."""
        return step if self.steps_per_epoch is None else int(step / self.steps_per_epoch)


class _StreamMaker:
    """The next batch of one worker's stream, which begins when the first batch is made."""

    def __init__(
        self,
        stream: _Stream,
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        *,
        size: int,
        first: int,
        captions: CaptionSampler,
        crop: CropConfig | None,
        augment: AugmentConfig | None,
        trim: bool,
    ) -> None:
        self.stream, self.pictures, self.tokenizer = stream, Pictures(preprocess), tokenizer
        self.size, self.first, self.captions, self.crop = size, first, captions, crop
        self.config, self.trim = augment, trim
        self._samples: Iterator[StreamSample] | None = None
        self._faults: list[StreamFault] = []

    def _start(self) -> Iterator[StreamSample]:
        """This worker's stream: every worker of every rank has its own random numbers."""
        info, stream = get_worker_info(), self.stream
        key = (stream.seed, stream.rank, stream.start_step, info.id if info else 0)
        draw, mix = (int(number) for number in np.random.SeedSequence(key).generate_state(2))
        shards = ResampledShards(stream.shards, seed=draw, worker_seed=lambda: draw, deterministic=True)
        mixed = shuffle_stage(stream.shuffle, initial=stream.shuffle // 2, rng=random.Random(mix))
        return iter(DataPipeline(shards, self._read, mixed))

    def _read(self, drawn: Iterable[dict[str, str]]) -> Generator[StreamSample, None, None]:
        """The samples of drawn shards, one shard after the other: a stage of the pipeline."""
        barren = 0
        for shard in drawn:
            barren += 1
            with closing(read_shard(shard["url"], self._faults.append, self.stream.retry)) as samples:
                for sample in samples:
                    barren = 0
                    yield sample
            if barren >= MAX_BAD_SHARDS:
                last = self._faults[-1].detail if self._faults else f"{shown(shard['url'])} holds no sample"
                raise DataError(f"{barren} shards in a row gave no sample; the last: {last}")

    def make(self, step: int) -> Batch:
        """The next samples of this worker's stream, as the batch of a step."""
        if self._samples is None:
            self._samples = self._start()
        epoch, bad = self.stream.epoch(step), 0
        images, records, ids = [], [], []
        while len(images) < self.size:
            sample = next(self._samples)
            number = stream_id(sample.shard, sample.record.key)
            try:
                images.append(self._picture(sample.record, epoch, number))
            except (ImageError, RecordError) as error:
                reason = picture_reason(error) if isinstance(error, ImageError) else error.reason
                fault = StreamFault(sample.shard, sample.index, sample.record.key, reason, error.message)
                self._faults.append(fault)
                bad += 1
                if bad >= MAX_BAD_SAMPLES:
                    raise DataError(f"{bad} samples in a row cannot be read; the last: {error}") from error
                continue
            bad = 0
            records.append(sample.record)
            ids.append(number)
        id_B, epoch_B = np.array(ids, dtype=np.int64), np.full(self.size, epoch, dtype=np.int64)
        images_B3SS = torch.stack(images)
        if self.config is not None:
            seed = self.stream.seed
            images_B3SS = augment(images_B3SS, self.config, seed=seed, epoch_N=epoch_B, id_N=id_B)
        return Batch(
            images=images_B3SS,
            ids=self._tokens(records, epoch_B, id_B),
            sample_ids=torch.from_numpy(id_B),
            epochs=torch.from_numpy(epoch_B),
            step=step,
            first=self.first,
            faults=self._bad_samples(step),
        )

    def _picture(self, record: Record, epoch: int, number: int) -> Tensor:
        """A record's picture, uint8 (3, S, S). Raises: ImageError; RecordError for an empty caption."""
        if self.tokenizer is not None and not record.caption:
            raise RecordError(f"{record.key}: the caption is empty", "empty caption")
        box = None
        if self.crop is not None:
            seed = self.stream.seed
            box = self.crop.boxes(seed=seed, epoch_n=np.array([epoch]), id_n=np.array([number]))[0]
        return self.pictures.load(record, box)

    def _tokens(self, records: Sequence[Record], epoch_B: np.ndarray, id_B: np.ndarray) -> Tensor:
        """Token ids of one caption per record, int64 (B, L)."""
        if self.tokenizer is None:
            return torch.zeros(len(records), 0, dtype=torch.int64)
        ids_BL = self.tokenizer.encode(draw_captions(self.captions, records, self.stream.seed, epoch_B, id_B))
        return trim(ids_BL, self.tokenizer.pad_id).contiguous() if self.trim else ids_BL

    def _bad_samples(self, step: int) -> tuple[BadSample, ...]:
        """What was left out since the last batch."""
        faults = self._faults.copy()
        self._faults.clear()
        return tuple(
            BadSample(
                id=stream_id(fault.shard, fault.key or ""),
                dataset=self.stream.name,
                shard=fault.shard,
                index=fault.index,
                key=fault.key or "",
                reason=fault.reason,
                detail=fault.detail,
                step=step,
            )
            for fault in faults
        )

    def close(self) -> None:
        """End what is being read."""
        samples, self._samples = self._samples, None
        if isinstance(samples, Generator):
            samples.close()


class StreamBatches:
    """Endless batches of one rank from a stream of shards; order, completeness and resume are not promised.

    Args:
        spec: See `stream_shards`.
        preprocess, tokenizer, batch_size, seed, rank, world, captions, crop, augment, trim, pin_memory,
            max_bad, known_bad: As in `clipkit_data.batches.loader.TrainBatches`; a shard that could not be
            read to its end counts as one bad sample.
        workers: Worker processes; each reads a stream of its own.
        samples_per_epoch: What to call an epoch; None makes every step an epoch of its own.
        shuffle: Samples in the buffer of each worker from which the next one is drawn; encoded pictures.
        start_step: Number of the first batch; another number is another stream.
        retry: How transient faults of a server are met.

    Attributes:
        quarantine: What this rank left out.

    Raises:
        ConfigError: A batch that the ranks cannot share, or a number below its least.
        NotFoundError: No such shards.
        InputError: They cannot be listed.
        DataError: When iterated: ten shards or a hundred samples in a row that cannot be read, or too many.
    """

    def __init__(
        self,
        spec: str | Path | Sequence[str | Path],
        preprocess: Preprocess,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        captions: CaptionSampler | None = None,
        crop: CropConfig | None = None,
        augment: AugmentConfig | None = None,
        samples_per_epoch: int | None = None,
        shuffle: int = 1000,
        start_step: int = 0,
        trim: bool = True,
        pin_memory: bool = False,
        max_bad: float = 1.0,
        known_bad: Sequence[BadSample] = (),
        retry: Retry | None = None,
    ) -> None:
        if not 0 <= rank < world or batch_size < world:
            raise ConfigError(f"batch_size {batch_size} cannot be shared: rank {rank} of {world} processes")
        if min(seed, workers, start_step) < 0 or min(shuffle, samples_per_epoch or 1) < 1:
            raise ConfigError(
                f"seed {seed}, workers {workers}, start_step {start_step}: at least 0 each; "
                f"shuffle {shuffle}, samples_per_epoch {samples_per_epoch}: at least 1 each"
            )
        self.name = shown(str(spec))
        self.batch_size, self.start_step, self.samples = batch_size, start_step, samples_per_epoch
        self.workers, self.pin_memory = workers, pin_memory
        self.quarantine = Quarantine(max_bad, known_bad)
        stream = _Stream(
            shards=stream_shards(spec),
            name=self.name,
            seed=seed,
            rank=rank,
            start_step=start_step,
            shuffle=shuffle,
            steps_per_epoch=self.steps_per_epoch,
            retry=retry or Retry(),
        )
        first = rank * batch_size // world
        self._maker = partial(
            _StreamMaker,
            stream,
            preprocess,
            tokenizer,
            size=(rank + 1) * batch_size // world - first,
            first=first,
            captions=captions or CaptionSampler(),
            crop=crop,
            augment=augment,
            trim=trim,
        )
        number = len(stream.shards)
        log.warning("%s: %d shards as a stream: no promised order, completeness or resume", self.name, number)

    @property
    def steps_per_epoch(self) -> float | None:
        """Global batches per epoch, None where no epoch was named."""
        return self.samples / self.batch_size if self.samples else None

    def __iter__(self) -> Iterator[Batch]:
        maker = self._maker()
        steps = count(self.start_step)
        try:
            for batch in in_workers(maker.make, steps, workers=self.workers, pin_memory=self.pin_memory):
                self.quarantine.add(batch.faults, len(batch.sample_ids))
                yield batch
        finally:
            maker.close()
