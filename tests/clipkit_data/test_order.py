"""The computed order: equal to one that is built in memory, complete, and the same however it is sliced."""

import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import ConfigError
from clipkit_data.batches.order import _BLOCK, _SHARDS, Mixture, Order, Plan, Source, permutation

SIZES = st.lists(st.integers(0, 25), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0)
Sample = tuple[int, int, int]


def naive_lane(sizes: list[int], seed: int, lanes: int, window: int, lane: int, epochs: int) -> list[Sample]:
    """What a lane reads in its first epochs: (epoch, shard, index) each, from lists in memory."""
    total, read = sum(sizes), []
    for epoch in range(epochs):
        shards = permutation(len(sizes), seed, _SHARDS, epoch).tolist()
        line = [(epoch, shard, index) for shard in shards for index in range(sizes[shard])]
        part = (lane + epoch) % lanes
        cuts = [number * total // lanes for number in range(lanes + 1)]
        mine = line[cuts[part] : cuts[part + 1]]
        for number, start in enumerate(range(0, len(mine), window)):
            block = mine[start : start + window]
            read += [block[at] for at in permutation(len(block), seed, _BLOCK, epoch, part, number)]
    return read


@given(sizes=SIZES, lanes=st.integers(1, 9), window=st.integers(1, 30), seed=st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_the_order_is_that_of_lists_in_memory(sizes: list[int], lanes: int, window: int, seed: int) -> None:
    order, epochs = Order(sizes, seed=seed, lanes=lanes, window=window), lanes + 3
    naive = [naive_lane(sizes, seed, lanes, window, lane, epochs) for lane in range(lanes)]
    turns = min(len(lane) for lane in naive)
    places = order.at(np.arange(turns * lanes))
    found = list(zip(places.epoch.tolist(), places.shard.tolist(), places.index.tolist(), strict=True))
    assert found == [naive[place % lanes][place // lanes] for place in range(turns * lanes)]


@given(sizes=SIZES, lanes=st.integers(1, 9), window=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_every_sample_comes_once_in_every_epoch(sizes: list[int], lanes: int, window: int, seed: int) -> None:
    order = Order(sizes, seed=seed, lanes=lanes, window=window)
    places = order.at(np.arange(4 * order.samples + 2 * lanes))
    seen = Counter(zip(places.epoch.tolist(), places.shard.tolist(), places.index.tolist(), strict=True))
    assert set(seen.values()) == {1}
    for epoch in range(3):
        assert sum(1 for sample in seen if sample[0] == epoch) == order.samples
    assert all(index < sizes[shard] for _, shard, index in seen)


@given(
    sizes=SIZES, lanes=st.integers(1, 6), batch=st.integers(1, 40), step=st.integers(0, 50), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_a_batch_is_the_same_whoever_asks_and_whenever(
    sizes: list[int], lanes: int, batch: int, step: int, data: st.DataObject
) -> None:
    def plan() -> Plan:
        orders = [Order(sizes, seed=seed, lanes=lanes, window=5) for seed in (1, 2)]
        return Plan([Source(orders[0], 0.7), Source(orders[1], 0.3)], batch)

    used, fresh = plan(), plan()
    for earlier in range(step):
        used.batch(earlier)
    whole = fresh.batch(step)
    again = used.batch(step)
    for name in ("source", "epoch", "shard", "index"):
        assert np.array_equal(getattr(whole, name), getattr(again, name))
        ranks = data.draw(st.integers(1, batch))
        cuts = [rank * batch // ranks for rank in range(ranks + 1)]
        parts = [getattr(whole[slice(a, b)], name) for a, b in pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), getattr(whole, name))
    assert len(whole.source) == batch


@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=5),
    batch=st.integers(1, 100),
    steps=st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_every_batch_has_whole_shares_near_the_weights(weights: list[float], batch: int, steps: int) -> None:
    mixture, before = Mixture(weights), [0] * len(weights)
    for step in range(1, steps + 1):
        counts = mixture.counts(step * batch)
        assert sum(counts) == step * batch
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - step * batch * weight / sum(weights)) < len(weights)
        before = counts


def test_sources_are_read_by_weight_and_each_of_its_samples_once_an_epoch() -> None:
    orders = [Order(sizes, seed=1, lanes=2, window=3) for sizes in ([7, 3], [20], [5, 5, 5])]
    plan = Plan([Source(order, weight) for order, weight in zip(orders, (0.5, 0.2, 0.3), strict=True)], 10)
    batches = [plan.batch(step) for step in range(40)]
    assert [np.bincount(batch.source, minlength=3).tolist() for batch in batches] == [[5, 2, 3]] * 40
    for number, samples in enumerate((10, 20, 15)):
        seen: list[Sample] = []
        for batch in batches:
            mine = batch.source == number
            seen += zip(
                batch.epoch[mine].tolist(),
                batch.shard[mine].tolist(),
                batch.index[mine].tolist(),
                strict=True,
            )
        assert len(seen) == len(set(seen))
        assert sum(1 for sample in seen if sample[0] == 1) == samples
    assert plan.epochs(40) == [20, 4, 8]


def test_a_rank_of_many_reads_few_shards() -> None:
    """Lanes keep what a rank reads together: 8 ranks read little more than every shard once, together."""
    sizes = np.random.Generator(np.random.Philox(0)).integers(500, 1500, size=400)
    order = Order(sizes, seed=0, lanes=64, window=2000)
    plan, steps = Plan([Source(order)], 512), int(sizes.sum()) // 512
    read: list[set[int]] = [set() for _ in range(8)]
    for step in range(steps):
        batch = plan.batch(step)
        for rank in range(8):
            read[rank].update(batch[slice(rank * 64, (rank + 1) * 64)].shard.tolist())
    assert sum(len(shards) for shards in read) < 1.2 * len(sizes)


def test_epochs_differ_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order([300, 700], seed=seed, lanes=1, window=1000)
        places = order.at(np.arange(1000) + number * 1000)
        return (places.shard * 1000 + places.index).tolist()

    assert epoch(0, 0) == epoch(0, 0)
    assert sorted(epoch(0, 0)) == sorted(epoch(0, 1)) == sorted(epoch(1, 0))
    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4
    middle = np.mean([np.mean(epoch(seed, 0)[:100]) for seed in range(50)])
    everything = np.mean(epoch(0, 0))
    assert abs(middle - everything) < 25  # 5 standard errors: the first hundred are like all


def test_two_billion_samples_take_little_memory() -> None:
    sizes = np.full(200_000, 10_000)
    tracemalloc.start()
    plan = Plan([Source(Order(sizes, seed=0, lanes=64, window=8192))], 4096)
    for step in (0, 123_456, 10**7):
        assert len(plan.batch(step).index) == 4096
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


def test_an_order_of_nothing_is_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"sizes": []}, {"sizes": [0]}, {"seed": -1}, {"lanes": 0}, {"window": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            Order(**{"sizes": [3], "seed": 0, "lanes": 1, "window": 1, **wrong})
    for weights in ([], [0.0], [-1.0, 2.0], [float("nan")]):
        with pytest.raises(ConfigError, match="weights"):
            Mixture(weights)
