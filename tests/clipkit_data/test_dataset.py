"""Shards as a map: the same records as webdataset gives, by position, in any process."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from clipkit.errors import DataError
from clipkit_data.dataset import ShardDataset, record_id
from clipkit_data.records import RecordError
from clipkit_data.sources import resolve_shards


def test_records_by_position(shards: Path) -> None:
    dataset = ShardDataset(resolve_shards(shards))
    assert len(dataset) == 13
    assert dataset.has_captions
    theirs = []
    for path in resolve_shards(shards):
        with path.open("rb") as file:
            files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            theirs += list(webdataset.tariterators.group_by_keys(files))
    for position, other in enumerate(theirs):
        record = dataset[position]
        assert record.id == ((0, position) if position < 7 else (1, position - 7))
        assert dataset.sample_id(position) == record_id(*record.id)
        assert (record.key, record.image) == (other["__key__"], other["png"])
        assert record.caption == other["txt"].decode()
        assert record.meta["name"] == f"name {position}"
        assert dataset.key(position) == record.key
    with pytest.raises(IndexError):
        dataset[13]


def test_travels_to_other_processes(shards: Path) -> None:
    dataset = ShardDataset(resolve_shards(shards))
    first = dataset[8]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[8] == first
    dataset.close()
    assert dataset[8] == first


def test_many_shards_with_few_open_files(
    write_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit_data.dataset._OPEN_FILES", 2)
    paths = [write_shard(f"{number:05d}.tar", 1, start=number) for number in range(5)]
    dataset = ShardDataset(paths)
    assert [dataset[position].caption for position in (0, 4, 1, 3, 2, 0)] == [
        f"caption {number}" for number in (0, 4, 1, 3, 2, 0)
    ]
    assert len(dataset._files) == 2


def test_faults_are_kept_and_logged(
    write_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_shard("00000.tar", 5)
    path.write_bytes(path.read_bytes()[:9000])
    with caplog.at_level(logging.WARNING):
        dataset = ShardDataset([path])
    assert 0 < len(dataset) < 5
    assert {fault.reason for fault in dataset.faults} >= {"cut data"}
    assert "cut data ×1" in caplog.text
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no sound sample"):
        ShardDataset([path])


def test_bad_caption_and_json_name_the_sample(
    write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    samples = [
        {"__key__": "latin", "png": picture(0), "txt": "é".encode("latin-1"), "json": b"{}"},
        {"__key__": "json", "png": picture(0), "txt": b"words", "json": b"{"},
    ]
    dataset = ShardDataset([write_shard("00000.tar", samples)])
    for position, reason in enumerate(("caption is not UTF-8", "invalid json")):
        with pytest.raises(RecordError, match=dataset.key(position)) as caught:
            dataset[position]
        assert caught.value.reason == reason


def test_shard_that_shrinks_is_an_error(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 3)
    dataset = ShardDataset([path])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="became shorter"):
        dataset[2]


def test_fingerprint_follows_the_samples(write_shard: Callable[..., Path]) -> None:
    one = ShardDataset([write_shard("a/00000.tar", 3)]).fingerprint()
    same = ShardDataset([write_shard("b/00000.tar", 3)]).fingerprint()
    other = ShardDataset([write_shard("c/00000.tar", 4)]).fingerprint()
    assert one == same != other
