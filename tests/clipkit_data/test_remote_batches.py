"""Training batches from a server that fails: the same samples in the same order, or a clear stop."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.errors import DataError
from clipkit.images import Preprocess
from clipkit_data.batches.loader import Batch, TrainBatches
from clipkit_data.dataset import ShardDataset
from clipkit_data.remote.cache import ShardFiles
from clipkit_data.remote.retry import Retry
from clipkit_data.remote.storage import read_bytes
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.indexing import index_shards
from tests.clipkit_data.flaky_server import Fault, FlakyServer, flaky_server

QUICK = Retry(attempts=4, first=0.0, longest=0.0, timeout=5.0)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with flaky_server() as held:
        yield held


def batches(dataset: ShardDataset, **options: Any) -> list[Batch]:
    options = {"batch_size": 5, "seed": 2, "lanes": 2, "window": 3} | options
    return list(islice(TrainBatches(dataset, Preprocess(size=16), None, **options), 6))


def remote(server: FlakyServer, folder: Path, cache: Path, *, index: bool = True) -> ShardDataset:
    for path in folder.iterdir():
        if index or path.suffix == ".tar":
            server.put(f"set/{path.name}", path.read_bytes())
    return ShardDataset(
        resolve_shards(f"{server.url}/set/{{00000..00001}}.tar"), files=ShardFiles(cache, retry=QUICK)
    )


def same(first: list[Batch], second: list[Batch]) -> bool:
    return all(
        torch.equal(a.sample_ids, b.sample_ids) and torch.equal(a.images, b.images)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(cut=700), Fault(cut=0), Fault(stall=0.05)],
    ids=["500", "cut", "drop", "slow"],
)
def test_a_failing_server_changes_nothing(
    server: FlakyServer, shards: Path, tmp_path: Path, fault: Fault, index: bool
) -> None:
    index_shards(shards)
    local = batches(ShardDataset(resolve_shards(shards)))
    dataset = remote(server, shards, tmp_path / "cache", index=index)
    for name in ("00000.tar", "00001.tar"):
        server.fail(f"set/{name}", fault, times=2)
    assert same(batches(dataset), local)
    assert same(batches(dataset, workers=2), local)
    assert dataset.fingerprint() == ShardDataset(resolve_shards(shards)).fingerprint()


def test_a_server_that_stays_away_stops_the_run_and_another_start_goes_on(
    server: FlakyServer, shards: Path, tmp_path: Path
) -> None:
    index_shards(shards)
    local = batches(ShardDataset(resolve_shards(shards)))
    dataset = remote(server, shards, tmp_path / "cache")
    for name in ("00000.tar", "00001.tar"):
        server.fail(f"set/{name}", Fault(status=503), times=100)
    with pytest.raises(DataError, match=r"0000[01]\.tar: gave up after 4 tries"):
        batches(dataset)
    server.mend()
    assert same(batches(dataset), local)


def test_a_shard_of_another_length_than_the_manifest_says_is_never_read(
    server: FlakyServer, shards: Path, tmp_path: Path
) -> None:
    index_shards(shards)
    dataset = remote(server, shards, tmp_path / "cache")
    whole = (shards / "00001.tar").read_bytes()
    server.put("set/00001.tar", whole[:-1024])
    with pytest.raises(DataError, match=r"00001\.tar"):
        batches(dataset)


@pytest.fixture
def few(server: FlakyServer, write_shard: Callable[..., Path], tmp_path: Path) -> ShardDataset:
    """Six remote shards of which the cache holds two."""
    paths = [write_shard(f"six/{number:05d}.tar", 2, start=2 * number) for number in range(6)]
    index_shards(tmp_path / "six")
    for path in (tmp_path / "six").iterdir():
        server.put(f"set/{path.name}", path.read_bytes())
    files = ShardFiles(tmp_path / "cache", sum(path.stat().st_size for path in paths[:2]), retry=QUICK)
    return ShardDataset(resolve_shards(f"{server.url}/set"), files=files)


def test_copies_that_made_room_are_not_kept_open(few: ShardDataset) -> None:
    limit = few.total_bytes // 3
    assert few.cache_limit == limit
    for position in (0, 4, 2, 6, 11, 8, 0, 1):
        assert few[position].caption == f"caption {position}"
        kept = [os.fstat(file) for file in few._files.values()]
        assert all(file.st_nlink for file in kept)
        assert sum(file.st_size for file in kept) <= limit


def test_a_step_whose_shards_do_not_fit_is_not_fetched_ahead(few: ShardDataset, server: FlakyServer) -> None:
    few.prefetch(range(6))
    few.prefetch([4, 5])
    assert few.files is not None
    for _ in range(500):
        if not few.files._own.asked:
            break
        time.sleep(0.02)
    fetched = [number for number in range(6) if server.count("GET", f"set/{number:05d}.tar")]
    assert fetched == [4, 5]


def test_a_manifest_that_does_not_come_stops_and_fetches_nothing(
    server: FlakyServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit_data.shards.opening.read_bytes", partial(read_bytes, retry=QUICK))
    index_shards(shards)
    for path in shards.iterdir():
        server.put(f"set/{path.name}", path.read_bytes())
    server.fail("set/manifest.json", Fault(status=500), times=100)
    server.fail("set/manifest.json", Fault(status=500), times=100, method="HEAD")
    paths = resolve_shards(f"{server.url}/set/{{00000..00001}}.tar")
    with pytest.raises(DataError, match=r"manifest\.json: gave up"):
        ShardDataset(paths, files=ShardFiles(tmp_path / "cache", retry=QUICK))
    assert server.count("GET", "set/00000.tar") == 0
