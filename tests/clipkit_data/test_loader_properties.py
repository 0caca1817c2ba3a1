"""For any shards, lanes, window, batch, ranks and workers, the loader reads what lists in memory say.

The loader computes each batch from its number. Here the same is built the plain way, place after place, from
endless lists; then the loader is stopped and started again, elsewhere, and must go on as if it had not been.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipkit.images import Preprocess
from clipkit_data.batches.loader import Batch, TrainBatches
from clipkit_data.batches.order import _BLOCK, _SHARDS, permutation
from clipkit_data.dataset import ShardDataset
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.shards.writing import entry, write_shard
from tests.clipkit_data.conftest import make_picture

LARGEST = 7
PREPROCESS = Preprocess(size=8)
AUGMENT = AugmentConfig(rotate=10, flip=0.5, brightness=0.2)
SIZES = st.lists(st.integers(0, LARGEST), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)
MANY = settings(max_examples=60, deadline=None)
FEW = settings(max_examples=4, deadline=None)
Sample = tuple[int, int, int]
"""Epoch, shard, place in the shard."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of each size, and `damaged.tar` of five samples, one of which is no picture."""
    folder = tmp_path_factory.mktemp("shards")
    pictures = [make_picture(number, side=8) for number in range(LARGEST)]
    for size in range(1, LARGEST + 1):
        write_pictures(folder, str(size), pictures[:size])
    (folder / "0.tar").write_bytes(bytes(1024))
    write_pictures(folder, "damaged", [*pictures[:2], b"no picture", *pictures[2:4]])
    return folder


def write_pictures(folder: Path, name: str, pictures: Sequence[bytes]) -> None:
    samples = [{"image": picture, "ext": "png", "caption": "words"} for picture in pictures]
    write_shard((entry(f"{number:04d}", sample) for number, sample in enumerate(samples)), folder, name)


def dataset(shards: Path, sizes: Sequence[int | str]) -> ShardDataset:
    """Shards of these sizes; equal ones are one file, since a sample's id is its shard's number and place."""
    return ShardDataset([shards / f"{size}.tar" for size in sizes])


def loader(datasets: ShardDataset | list[ShardDataset], **options: Any) -> TrainBatches:
    return TrainBatches(datasets, PREPROCESS, None, **options)


def taken(source: TrainBatches, steps: int) -> list[Batch]:
    batches = list(islice(source, steps))
    assert len(batches) == steps
    return batches


def naive_lane(sizes: Sequence[int], seed: int, lanes: int, window: int, lane: int) -> Iterator[Sample]:
    """What a lane reads, without end: in each epoch its range of the line of all samples, by windows."""
    total = sum(sizes)
    cuts = [number * total // lanes for number in range(lanes + 1)]
    for epoch in count():
        order = permutation(len(sizes), seed, _SHARDS, epoch).tolist()
        line = [(epoch, shard, index) for shard in order for index in range(sizes[shard])]
        part = (lane + epoch) % lanes
        mine = line[cuts[part] : cuts[part + 1]]
        for number, start in enumerate(range(0, len(mine), window)):
            block = mine[start : start + window]
            yield from (block[at] for at in permutation(len(block), seed, _BLOCK, epoch, part, number))


def naive_batches(
    sources: Sequence[Sequence[int]], *, first: float, seed: int, lanes: int, window: int, batch: int
) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, sample id) of each row of each global batch; `first` is the first of two sources' share."""
    reading = [
        [naive_lane(sizes, seed + number, lanes, window, lane) for lane in range(lanes)]
        for number, sizes in enumerate(sources)
    ]
    turns = [0] * len(sources)
    for step in count():
        rows = []
        for place in range(step * batch, (step + 1) * batch):
            source = 0 if int((place + 1) * first) > int(place * first) else 1
            lane = turns[source] % lanes
            turns[source] += 1
            epoch, shard, index = next(reading[source][lane])
            rows.append((source, lane, epoch, source << 56 | shard << 32 | index))
        rows.sort(key=lambda row: row[:2])
        yield [row[2:] for row in rows]


def rows_of(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    """The (epoch, sample id) of the rows of several ranks' parts of a batch."""
    pairs = [zip(part.epochs.tolist(), part.sample_ids.tolist(), strict=True) for part in batches]
    return [pair for part in pairs for pair in part]


ORDER = {
    "sizes": SIZES,
    "lanes": st.integers(1, 5),
    "window": st.integers(1, 12),
    "batch": st.integers(1, 9),
    "seed": st.integers(0, 2**40),
}


@given(**ORDER, steps=st.integers(1, 8), data=st.data())
@MANY
def test_all_ranks_together_read_the_naive_order(
    shards: Path, sizes: list[int], lanes: int, window: int, batch: int, seed: int, steps: int, data: Any
) -> None:
    source, ranks = dataset(shards, sizes), data.draw(st.integers(1, batch))
    options = {"batch_size": batch, "seed": seed, "lanes": lanes, "window": window}
    parts = [taken(loader(source, rank=rank, world=ranks, **options), steps) for rank in range(ranks)]
    naive = naive_batches([sizes], first=1, seed=seed, lanes=lanes, window=window, batch=batch)
    alone = taken(loader(source, **options), steps)
    for *mine, whole, expected in zip(*parts, alone, islice(naive, steps), strict=True):
        assert rows_of(mine) == rows_of([whole]) == expected
        assert sum(part.checksum() for part in mine) % 2**64 == whole.checksum()


@given(
    **ORDER,
    other=SIZES,
    quarters=st.integers(1, 3),
    steps=st.integers(1, 6),
)
@MANY
def test_two_sources_read_the_naive_order(
    shards: Path,
    sizes: list[int],
    other: list[int],
    lanes: int,
    window: int,
    batch: int,
    seed: int,
    quarters: int,
    steps: int,
) -> None:
    both = [dataset(shards, sizes), dataset(shards, other)]
    options = {"batch_size": batch, "seed": seed, "lanes": lanes, "window": window}
    found = taken(loader(both, weights=[quarters, 4 - quarters], **options), steps)
    naive = naive_batches(
        [sizes, other], first=quarters / 4, seed=seed, lanes=lanes, window=window, batch=batch
    )
    assert [rows_of([whole]) for whole in found] == list(islice(naive, steps))


@given(**ORDER, ranks=st.integers(1, 4))
@MANY
def test_an_epoch_has_every_sample_once_and_all_ranks_have_equally_many_batches(
    shards: Path, sizes: list[int], lanes: int, window: int, batch: int, seed: int, ranks: int
) -> None:
    batch, total = max(batch, ranks), sum(sizes)
    steps = -(-(2 * total + lanes * lanes) // batch)  # lanes enter an epoch up to that many places apart
    options = {"batch_size": batch, "seed": seed, "lanes": lanes, "window": window, "world": ranks}
    source = dataset(shards, sizes)
    parts = [taken(loader(source, rank=rank, **options), steps) for rank in range(ranks)]
    assert {part.step for rank in parts for part in rank} == set(range(steps))
    read = Counter(pair for rank in parts for pair in rows_of(rank))
    everything = {shard << 32 | index for shard, size in enumerate(sizes) for index in range(size)}
    for epoch in range(2):
        assert {sample: times for (at, sample), times in read.items() if at == epoch} == dict.fromkeys(
            everything, 1
        )


def same(first: Batch, second: Batch) -> bool:
    tensors = ("images", "sample_ids", "epochs")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors) and (
        (first.step, first.first, first.faults) == (second.step, second.first, second.faults)
    )


def whole_of(parts: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures and ids of a global batch, from the ranks' parts of it."""
    return torch.cat([part.images for part in parts]), torch.cat([part.sample_ids for part in parts])


@given(**ORDER, kill=st.integers(0, 9), data=st.data())
@example(sizes=[5], lanes=1, window=12, batch=5, seed=0, kill=2, data=None)
@MANY
def test_a_loader_that_starts_later_goes_on_with_the_tail(
    shards: Path, sizes: list[int], lanes: int, window: int, batch: int, seed: int, kill: int, data: Any
) -> None:
    source = dataset(shards, [*sizes, "damaged"])
    options = {"batch_size": batch, "seed": seed, "lanes": lanes, "window": window, "augment": AUGMENT}
    whole = taken(loader(source, **options), kill + 4)
    tail = taken(loader(source, start_step=kill, **options), 4)
    assert all(map(same, whole[kill:], tail))
    ranks = batch if data is None else data.draw(st.integers(1, batch))
    parts = [
        taken(loader(source, start_step=kill, rank=rank, world=ranks, **options), 4) for rank in range(ranks)
    ]
    for expected, *mine in zip(tail, *parts, strict=True):
        images, ids = whole_of(mine)
        assert torch.equal(images, expected.images)
        assert torch.equal(ids, expected.sample_ids)


@pytest.mark.parametrize("workers", [1, 3])
@given(**ORDER, kill=st.integers(0, 5))
@FEW
def test_workers_change_nothing_before_or_after_a_resume(
    shards: Path, workers: int, sizes: list[int], lanes: int, window: int, batch: int, seed: int, kill: int
) -> None:
    source = dataset(shards, [*sizes, "damaged"])
    options = {"batch_size": batch, "seed": seed, "lanes": lanes, "window": window, "augment": AUGMENT}
    alone = taken(loader(source, **options), kill + 3)
    resumed = taken(loader(source, start_step=kill, workers=workers, **options), 3)
    assert all(map(same, alone[kill:], resumed))
