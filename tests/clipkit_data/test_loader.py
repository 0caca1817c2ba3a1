"""Training batches: the same for any number of workers and ranks, resumable, and never short."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.errors import ConfigError, DataError, ImageError, InputError, NotFoundError
from clipkit.images import Preprocess
from clipkit.text import ClipTokenizer
from clipkit_data.batches.loader import Batch, TrainBatches
from clipkit_data.batches.pairs import EvalBatches, load_pairs
from clipkit_data.batches.workers import in_workers
from clipkit_data.captions import CaptionSampler
from clipkit_data.dataset import ShardDataset
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import family
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards

PREPROCESS = Preprocess(size=16)
CONFIG = AugmentConfig(rotate=10, crop=0.2, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(context_length=16)


@pytest.fixture
def batches(shards: Path, tokenizer: ClipTokenizer) -> Callable[..., TrainBatches]:
    dataset = ShardDataset(resolve_shards(shards))

    def make(**options: Any) -> TrainBatches:
        options = {"batch_size": 4, "seed": 3, "augment": CONFIG} | options
        return TrainBatches(dataset, PREPROCESS, tokenizer, **options)

    return make


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.sample_ids, b.sample_ids)
        and (a.epoch, a.step, a.faults) == (b.epoch, b.step, b.faults)
        for a, b in zip(first, second, strict=True)
    )


def test_each_sample_once_per_epoch_and_no_tail_lost(batches: Callable[..., TrainBatches]) -> None:
    source = batches()
    assert source.steps_per_epoch == 13 / 4
    taken = list(islice(source, 13))  # four epochs of 13 samples in 13 batches of 4
    ids = torch.cat([batch.sample_ids for batch in taken]).tolist()
    for epoch in range(4):
        assert len(set(ids[13 * epoch : 13 * (epoch + 1)])) == 13
    assert ids[:13] != ids[13:26]
    assert [batch.step for batch in taken] == list(range(13))
    assert [batch.epoch for batch in taken[:5]] == [0, 0, 0, 0, 1]
    assert not source.quarantine.samples


def test_shapes_and_types(batches: Callable[..., TrainBatches]) -> None:
    batch = next(iter(batches()))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.ids.shape == (4, 8)
    assert batch.ids.dtype == batch.sample_ids.dtype == torch.int64
    assert next(iter(batches(trim=False))).ids.shape == (4, 16)
    moved = batch.to("cpu")
    assert torch.equal(moved.images, batch.images)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_workers_and_cache_change_nothing(
    batches: Callable[..., TrainBatches], workers: int, cache: bool
) -> None:
    options = {"captions": CaptionSampler({"caption": 1, "keywords": 2})}
    alone = list(islice(batches(**options), 7))
    assert same(list(islice(batches(workers=workers, cache=cache, **options), 7)), alone)
    assert same(list(islice(batches(cache=True, **options), 7)), alone)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch(batches: Callable[..., TrainBatches], world: int) -> None:
    alone = list(islice(batches(trim=False), 6))
    parts = [list(islice(batches(trim=False, rank=rank, world=world), 6)) for rank in range(world)]
    for whole, *ranks in zip(alone, *parts, strict=True):
        assert torch.equal(torch.cat([part.images for part in ranks]), whole.images)
        assert torch.equal(torch.cat([part.ids for part in ranks]), whole.ids)
        assert torch.equal(torch.cat([part.sample_ids for part in ranks]), whole.sample_ids)


def test_augmentation_is_the_same_in_workers_and_afterwards(batches: Callable[..., TrainBatches]) -> None:
    for config in (CONFIG, family("simclr", 12), family("multi_crop", 12)):
        here = list(islice(batches(augment=config, workers=1), 5))
        later = [batch.augmented(config, 3) for batch in islice(batches(augment=None), 5)]
        assert same(here, later)
        for a, b in zip(here, later, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    assert [tuple(view.shape) for view in later[0].views[:3]] == [(4, 3, 12, 12)] * 2 + [(4, 3, 96, 96)]


def test_crops_are_the_same_for_all_and_new_in_each_epoch(batches: Callable[..., TrainBatches]) -> None:
    options: dict[str, Any] = {"crop": CropConfig(scale=(0.3, 1.0)), "augment": None, "trim": False}
    alone = list(islice(batches(**options), 7))
    assert same(list(islice(batches(workers=2, **options), 7)), alone)
    half = list(islice(batches(rank=1, world=2, **options), 7))
    assert all(torch.equal(a.images[2:], b.images) for a, b in zip(alone, half, strict=True))
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in alone:
        for number, picture in zip(batch.sample_ids.tolist(), batch.images, strict=True):
            seen.setdefault(number, []).append(picture)
    assert all(not torch.equal(first, second) for first, second, *_ in seen.values())
    with pytest.raises(ConfigError, match="cache"):
        batches(cache=True, **options)


def test_several_sources_are_mixed(
    shards: Path, write_shard: Callable[..., Path], tokenizer: ClipTokenizer
) -> None:
    both = [ShardDataset(resolve_shards(shards)), ShardDataset([write_shard("more/00000.tar", 5)])]
    options: dict[str, Any] = {"batch_size": 10, "seed": 0, "weights": [0.5, 0.5]}
    taken = list(islice(TrainBatches(both, PREPROCESS, tokenizer, **options), 6))
    for batch in taken:
        assert ((batch.sample_ids >> 56) == 1).sum() == 5
    assert len({tuple(sorted((batch.sample_ids & 0xFF)[5:].tolist())) for batch in taken}) == 1, (
        "an epoch each"
    )
    parts = [TrainBatches(both, PREPROCESS, tokenizer, rank=rank, world=3, **options) for rank in range(3)]
    total = sum(next(iter(part)).checksum() for part in parts) % 2**64
    assert total == taken[0].checksum() != taken[1].checksum()
    assert TrainBatches(both, PREPROCESS, tokenizer, batch_size=9).plan.mixture.counts(18) == [13, 5]
    digests = {
        TrainBatches(data, PREPROCESS, tokenizer, **{**options, **other}).digest()
        for data, other in (
            (both, {}),
            (both[::-1], {}),
            (both, {"seed": 1}),
            (both, {"weights": [1, 2]}),
            (both, {"lanes": 2}),
        )
    }
    assert len(digests) == 5
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        TrainBatches(both, PREPROCESS, tokenizer, batch_size=9, weights=[1.0])


def test_resume_goes_on_where_it_stopped(batches: Callable[..., TrainBatches]) -> None:
    alone = list(islice(batches(), 12))
    for start in (1, 3, 4, 11):  # also across an epoch's end
        assert same(list(islice(batches(start_step=start), 12 - start)), alone[start:])
    source = batches(start_step=3)
    assert same(list(islice(source, 2)), alone[3:5])
    assert same(list(islice(source, 2)), alone[3:5])


def test_batch_larger_than_the_dataset(batches: Callable[..., TrainBatches]) -> None:
    batch = next(iter(batches(batch_size=40)))
    counts = Counter(batch.sample_ids.tolist())
    assert set(counts.values()) == {3, 4}
    assert len(batch.images) == 40


def test_the_global_generator_is_left_alone(batches: Callable[..., TrainBatches]) -> None:
    torch.manual_seed(0)
    list(islice(batches(), 2))
    found = torch.rand(1)
    torch.manual_seed(0)
    assert found == torch.rand(1)


@pytest.fixture
def damaged(write_shard: Callable[..., Path], picture: Callable[..., bytes]) -> ShardDataset:
    """Eight samples, three of them bad."""
    samples: list[dict[str, object]] = [
        {"__key__": f"{n}", "png": picture(n), "txt": f"caption {n}".encode(), "json": b"{}"}
        for n in range(8)
    ]
    samples[1]["png"] = picture(1, side=64)[:300]
    samples[4]["txt"] = b"  "
    samples[6]["json"] = b"{"
    return ShardDataset([write_shard("bad/00000.tar", samples)])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_reported(
    damaged: ShardDataset, tokenizer: ClipTokenizer, workers: int
) -> None:
    source = TrainBatches(damaged, PREPROCESS, tokenizer, batch_size=8, seed=1, workers=workers)
    taken = list(islice(source, 3))
    for batch in taken:
        assert len(batch.images) == 8
        assert not {1, 4, 6} & set(batch.sample_ids.tolist())
        assert {0, 2, 3, 5, 7} <= set(batch.sample_ids.tolist())
    assert sorted((bad.key, bad.reason) for bad in source.quarantine.samples.values()) == [
        ("1", "picture undecodable"),
        ("4", "empty caption"),
        ("6", "invalid json"),
    ]
    assert source.quarantine.counts() == {"empty caption": 1, "invalid json": 1, "picture undecodable": 1}
    plain = TrainBatches(damaged, PREPROCESS, tokenizer, batch_size=8, seed=1)
    assert same(list(islice(plain, 3)), taken)


def test_pictures_alone_need_no_captions(damaged: ShardDataset) -> None:
    source = TrainBatches(damaged, PREPROCESS, None, batch_size=8, seed=1)
    batch = next(iter(source))
    assert batch.ids.shape == (8, 0)
    assert 4 in batch.sample_ids.tolist()


def test_nothing_sound_is_an_error(write_shard: Callable[..., Path], tokenizer: ClipTokenizer) -> None:
    samples = [{"__key__": str(n), "png": b"no picture", "txt": b"words"} for n in range(3)]
    dataset = ShardDataset([write_shard("none/00000.tar", samples)])
    with pytest.raises(DataError, match="in a row cannot be used"):
        next(iter(TrainBatches(dataset, PREPROCESS, tokenizer, batch_size=2)))
    with pytest.raises(DataError, match="no sample can be read"):
        load_pairs(dataset, PREPROCESS)


def test_wrong_arguments(
    batches: Callable[..., TrainBatches], write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    for wrong in ({"rank": 2, "world": 2}, {"batch_size": 1, "world": 2}, {"seed": -1}):
        with pytest.raises(ConfigError):
            batches(**wrong)
    silent = ShardDataset([write_shard("s/00000.tar", [{"__key__": "0", "png": picture(0)}])])
    with pytest.raises(InputError, match="no captions"):
        TrainBatches(silent, PREPROCESS, ClipTokenizer(16), batch_size=1)


def test_caption_fields() -> None:
    meta = {"keywords": ["a", " ", "b"], "name": "c", "empty": [], "number": 3}
    record = Record((0, 0), "0", b"", "words", meta)
    grid = [(x / 10, y / 10) for x in range(10) for y in range(10)]

    def drawn(fields: dict[str, float]) -> Counter[str]:
        sampler = CaptionSampler(fields)
        return Counter(sampler.draw(record, uniforms) for uniforms in grid)

    assert drawn({"caption": 1}) == {"words": 100}
    assert drawn({"keywords": 1}) == {"a": 50, "b": 50}
    assert drawn({"caption": 3, "name": 1, "keywords": 1}) == {"words": 60, "c": 20, "a": 10, "b": 10}
    assert drawn({"empty": 1, "number": 1, "gone": 1}) == {"words": 100}
    for wrong in ({"caption": 0.0}, {"caption": -1.0}, {"caption": float("nan")}):
        with pytest.raises(ConfigError, match=r"captions\.caption"):
            CaptionSampler(wrong)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_everything_once_in_order(shards: Path, workers: int) -> None:
    dataset = ShardDataset(resolve_shards(shards))
    parts = list(EvalBatches(dataset, PREPROCESS, batch_size=5, workers=workers))
    assert [len(part.images) for part in parts] == [5, 5, 3]
    whole = load_pairs(dataset, PREPROCESS, workers=workers)
    assert whole.captions == [f"caption {number}" for number in range(13)]
    assert whole.sample_ids.tolist() == [dataset.sample_id(position) for position in range(13)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert whole.records[8].meta["name"] == "name 8"
    assert len(load_pairs(dataset, PREPROCESS, limit=4).records) == 4


def test_evaluation_lists_what_it_leaves_out(damaged: ShardDataset) -> None:
    pairs = load_pairs(damaged, PREPROCESS)
    assert pairs.sample_ids.tolist() == [0, 2, 3, 5, 7]
    assert len(pairs.images) == 5
    assert [fault.key for fault in pairs.faults] == ["1", "4", "6"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_one_line(
    write_shard: Callable[..., Path], tokenizer: ClipTokenizer, workers: int
) -> None:
    path = write_shard("short/00000.tar", 4)
    dataset = ShardDataset([path])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="changed after it was opened") as caught:
        next(iter(TrainBatches(dataset, PREPROCESS, tokenizer, batch_size=4, workers=workers)))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_replaced_stops_the_run(write_shard: Callable[..., Path], workers: int) -> None:
    """What stands there now is another shard: its samples are not bad ones to be replaced by spares."""
    path = write_shard("one/00000.tar", 4)
    source = TrainBatches(ShardDataset([path]), PREPROCESS, None, batch_size=4, workers=workers)
    write_shard("one/00000.tar", 17)
    with pytest.raises(DataError, match=r"00000\.tar: the shard changed after it was opened"):
        next(iter(source))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_any_kind_comes_out_of_a_worker_as_itself(workers: int) -> None:
    for error in (
        NotFoundError("no x", "look at y"),
        ConfigError("bad z"),
        ImageError("torn", "undecodable"),
    ):
        with pytest.raises(type(error)) as caught:
            list(in_workers(partial(fail, error), [1], workers=workers))
        assert (caught.value.message, caught.value.hint) == (error.message, error.hint)


def fail(error: Exception, key: int) -> None:
    raise error


KILLED = """
import multiprocessing, os, signal, sys
from clipkit.images import Preprocess
from clipkit_data.dataset import ShardDataset
from clipkit_data.batches.loader import TrainBatches
running = iter(TrainBatches(ShardDataset(sys.argv[1:]), Preprocess(size=16), None, batch_size=4, workers=1))
next(running)
for child in multiprocessing.active_children():
    os.kill(child.pid, signal.SIGKILL)
while True:
    next(running)
"""


def test_a_killed_worker_stops_the_run(shards: Path) -> None:
    paths = [str(path) for path in resolve_shards(shards)]
    run = subprocess.run([sys.executable, "-c", KILLED, *paths], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "ended unexpectedly" in run.stderr or "DataLoader worker" in run.stderr
