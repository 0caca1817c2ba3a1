"""Shards as a map: the same records as webdataset gives, by position, in any process."""

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from clipkit.errors import DataError, InputError
from clipkit_data.dataset import ShardDataset, record_id
from clipkit_data.records import RecordError
from clipkit_data.shards.scan import scan_shard
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.indexing import index_shards


def test_records_by_position(shards: Path) -> None:
    dataset = ShardDataset(resolve_shards(shards))
    assert len(dataset) == 13
    assert dataset.has_captions
    theirs = []
    for path in resolve_shards(shards):
        with Path(path).open("rb") as file:
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
        assert dataset.members(position) == {name: other[name] for name in ("json", "png", "txt")}
    with pytest.raises(IndexError):
        dataset[13]


def test_travels_to_other_processes(shards: Path) -> None:
    dataset = ShardDataset(resolve_shards(shards))
    first = dataset[8]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[8] == first
    index_shards(shards)
    small = pickle.dumps(ShardDataset(resolve_shards(shards)))
    assert pickle.loads(small)[8] == first
    assert len(small) < len(pickle.dumps(dataset))  # places stay where they can be read again
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
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    with pytest.raises(DataError, match="changed after it was opened"):
        dataset[2]
    path.write_bytes(whole)
    assert dataset[1].key == "000000001"
    path.write_bytes(whole[:1000])  # the file is open now
    with pytest.raises(DataError, match="became shorter"):
        dataset[2]


def test_fingerprint_follows_the_samples(write_shard: Callable[..., Path]) -> None:
    one = ShardDataset([write_shard("a/00000.tar", 3)]).fingerprint()
    same = ShardDataset([write_shard("b/00000.tar", 3)]).fingerprint()
    other = ShardDataset([write_shard("c/00000.tar", 4)]).fingerprint()
    assert one == same != other


def test_progress_counts_the_shards(shards: Path) -> None:
    done: list[int] = []
    ShardDataset(resolve_shards(shards), jobs=1, progress=done.append)
    assert done == [1, 1]
    index_shards(shards)
    ShardDataset(resolve_shards(shards), progress=done.append)
    assert done == [1, 1, 2]


def test_a_shard_without_sound_samples_takes_no_positions(
    write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    paths = [
        write_shard("0.tar", [{"__key__": "a", "json": b"{}"}]),
        write_shard("1.tar", [{"__key__": "b", "png": picture(0)}]),
        write_shard("2.tar", []),
        write_shard("3.tar", [{"__key__": "c", "png": picture(0), "txt": b"words"}]),
    ]
    for _ in range(2):
        dataset = ShardDataset(paths)
        assert dataset.sizes.tolist() == [0, 1, 0, 1]
        assert [dataset.locate(position) for position in range(2)] == [(1, 0), (3, 0)]
        assert [dataset.key(position) for position in range(2)] == ["b", "c"]
        assert dataset.has_captions
        assert not ShardDataset(paths[1:2]).has_captions
        assert [fault.reason for fault in dataset.faults] == ["missing picture"]
        index_shards(paths)


def test_the_index_of_each_shard_can_be_walked(shards: Path) -> None:
    paths = resolve_shards(shards)
    dataset = ShardDataset(paths)
    assert [list(shard.samples) for shard in dataset.shards] == [list(scan_shard(p).samples) for p in paths]


def test_a_touched_shard_keeps_its_checksums(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A copy may be newer than its index: what is damaged in it must still be noticed."""
    index_shards(shards)
    path = shards / "00000.tar"
    data = bytearray(path.read_bytes())
    place = data.index(b"caption 3")
    data[place : place + 7] = b"Caption"
    path.write_bytes(data)
    os.utime(path, (2e9, 2e9))
    dataset = ShardDataset(resolve_shards(shards))
    assert not caplog.records
    with pytest.raises(RecordError, match="CRC") as caught:
        dataset[3]
    assert caught.value.reason == "CRC"
    assert dataset[4].caption == "caption 4"
    with pytest.raises(InputError, match="part of clipkit"):
        index_shards("sample:emoji/heldout")
