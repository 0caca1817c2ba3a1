"""The stream: always a next batch, from anywhere, and no loss that is not said."""

import gzip
import logging
import shlex
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.errors import ConfigError, DataError, InputError, NotFoundError
from clipkit.images import Preprocess
from clipkit.text import ClipTokenizer
from clipkit_data.batches.loader import Batch
from clipkit_data.batches.stream import StreamBatches, stream_shards
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.remote.storage import Retry
from clipkit_data.shards.tar_stream import StreamFault, read_shard, stream_id
from clipkit_data.sources import is_streamed
from tests.clipkit_data.flaky_server import Fault, FlakyServer, flaky_server

PREPROCESS = Preprocess(size=16)
WriteShard = Callable[..., Path]


def no_pause(seconds: float) -> None:
    """Time is not what is tested."""


QUICK = Retry(sleep=no_pause, timeout=5)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with flaky_server() as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer(context_length=16)


def take(count: int, spec: Any, tokenizer: ClipTokenizer | None = None, **options: Any) -> list[Batch]:
    options = {"batch_size": 4, "shuffle": 10, "retry": QUICK} | options
    batches = iter(StreamBatches(spec, PREPROCESS, tokenizer, **options))
    try:
        return list(islice(batches, count))
    finally:
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def ids(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.sample_ids for batch in batches]).tolist()


def read(shard: Path | str) -> tuple[list[str], list[StreamFault]]:
    faults: list[StreamFault] = []
    return [sample.record.key for sample in read_shard(str(shard), faults.append, QUICK)], faults


def test_what_is_streamed(shards: Path) -> None:
    assert is_streamed("pipe:cat x.tar")
    assert is_streamed("stream:https://host/{000..999}.tar")
    assert not is_streamed(shards)
    both = [str(shards / "00000.tar"), str(shards / "00001.tar")]
    assert stream_shards(f"stream:{shards}") == stream_shards(shards) == both
    commands = [f"pipe:cat {path}" for path in both]
    assert stream_shards(f"pipe:cat {shards}/0000{{0,1}}.tar") == commands
    assert stream_shards([f"stream:{shards}", "pipe:cat x"]) == [*both, "pipe:cat x"]
    assert stream_shards("stream:https://host/{8..10}.tar")[2] == "https://host/10.tar"
    with pytest.raises(NotFoundError):
        stream_shards(f"stream:{shards}/no")
    with pytest.raises(InputError):
        stream_shards("pipe:cat {0..")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_command(shards: Path, tokenizer: ClipTokenizer, workers: int) -> None:
    batches = take(12, f"pipe:cat {shards}/{{00000,00001}}.tar", tokenizer, workers=workers)
    assert [batch.step for batch in batches] == list(range(12))
    for batch in batches:
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.ids.shape[0] == 4
        assert batch.ids.dtype == batch.sample_ids.dtype == torch.int64
        assert not batch.faults
    known = {stream_id(f"pipe:cat {shards}/00000.tar", f"{number:09d}") for number in range(7)}
    known |= {stream_id(f"pipe:cat {shards}/00001.tar", f"{number:09d}") for number in range(7, 13)}
    assert set(ids(batches)) <= known
    assert len(set(ids(batches))) > 6


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_whose_connections_break(shards: Path, server: FlakyServer, workers: int) -> None:
    for path in shards.iterdir():
        server.put(path.name, path.read_bytes())
        server.fail(path.name, Fault(cut=9000), times=2)
        server.fail(path.name, Fault(status=503))
    batches = take(10, f"stream:{server.url}/{{00000..00001}}.tar", workers=workers)
    assert not [fault for batch in batches for fault in batch.faults]
    assert len(set(ids(batches))) > 6


def test_equal_ids_are_equal_samples(shards: Path) -> None:
    pictures: dict[int, torch.Tensor] = {}
    for batch in take(20, shards):
        for number, picture in zip(batch.sample_ids.tolist(), batch.images, strict=True):
            assert torch.equal(pictures.setdefault(number, picture), picture)
    assert len(pictures) == 13
    assert len({picture.numpy().tobytes() for picture in pictures.values()}) == 13


def test_each_rank_and_worker_and_start_has_its_own_stream(write_shard: WriteShard, tmp_path: Path) -> None:
    for shard in range(8):
        write_shard(f"many/{shard:05d}.tar", 4, start=4 * shard)
    options: dict[str, Any] = {"batch_size": 8, "world": 2}
    first = take(6, tmp_path / "many", rank=0, **options)
    second = take(6, tmp_path / "many", rank=1, **options)
    assert all(len(batch.sample_ids) == 4 for batch in first + second)
    assert (first[0].first, second[0].first) == (0, 4)
    assert ids(first) != ids(second)
    assert ids(first) == ids(take(6, tmp_path / "many", rank=0, **options))
    later = take(6, tmp_path / "many", rank=0, start_step=6, **options)
    assert later[0].step == 6
    assert ids(later) != ids(first)
    workers = take(6, tmp_path / "many", rank=0, workers=2, **options)
    assert ids(workers[::2]) != ids(workers[1::2])


def test_fewer_shards_than_workers_are_enough(write_shard: WriteShard) -> None:
    batches = take(9, write_shard("one.tar", 3), batch_size=5, workers=3)
    assert all(len(batch.images) == 5 for batch in batches)


def test_samples_come_in_another_order_than_they_lie(write_shard: WriteShard) -> None:
    path = write_shard("one.tar", 30)
    lie = [stream_id(str(path), f"{number:09d}") for number in range(30)]
    assert ids(take(6, path, batch_size=5, shuffle=1))[:15] == lie[:15]
    assert ids(take(6, path, batch_size=5, shuffle=20))[:15] != lie[:15]


def test_epochs_are_what_the_caller_calls_so(shards: Path) -> None:
    assert [batch.epoch for batch in take(6, shards, samples_per_epoch=8)] == [0, 0, 1, 1, 2, 2]
    assert [batch.epoch for batch in take(3, shards)] == [0, 1, 2]
    stream = StreamBatches(shards, PREPROCESS, None, batch_size=4, samples_per_epoch=10)
    assert stream.steps_per_epoch == 2.5


def test_a_sample_that_comes_again_is_changed_anew(write_shard: WriteShard) -> None:
    path, config = write_shard("one.tar", 1), AugmentConfig(rotate=30, brightness=0.5)
    looks = {batch.images.numpy().tobytes() for batch in take(4, path, batch_size=1, augment=config)}
    assert len(looks) == 4


def test_what_is_not_promised_is_said_once(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        take(5, shards, workers=2)
    said = [record.message for record in caplog.records if "no promised order" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize(
    "options", [{"rank": 2, "world": 2}, {"seed": -1}, {"shuffle": 0}, {"samples_per_epoch": -1}]
)
def test_options_that_cannot_be(shards: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        StreamBatches(shards, PREPROCESS, None, **{"batch_size": 4, **options})


def test_a_shard_cut_anywhere_is_reported(write_shard: WriteShard, tmp_path: Path) -> None:
    whole = write_shard("whole.tar", 3).read_bytes()
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        end = tar.getmembers()[-1]
        last = end.offset_data + -(-end.size // 512) * 512
    for cut in range(0, last + 1, 512):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        keys, faults = read(tmp_path / "cut.tar")
        assert [fault.reason for fault in faults] == ["shard cut or damaged"], cut
        assert faults[0].index == len(keys) <= 3
    (tmp_path / "cut.tar").write_bytes(whole[: last + 512])
    assert read(tmp_path / "cut.tar") == ([f"{number:09d}" for number in range(3)], [])


def test_a_damaged_or_zeroed_header_is_not_the_end(write_shard: WriteShard, tmp_path: Path) -> None:
    whole = write_shard("whole.tar", 3).read_bytes()
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        place = tar.getmembers()[3].offset  # the first of the second sample
    for damage in (bytes([whole[place] ^ 1]), bytes(512)):
        (tmp_path / "bad.tar").write_bytes(whole[:place] + damage + whole[place + len(damage) :])
        _, faults = read(tmp_path / "bad.tar")
        assert [fault.reason for fault in faults] == ["shard cut or damaged"]
    _, faults = read(f"pipe:cat {tmp_path}/whole.tar {tmp_path}/whole.tar")
    assert "data after the end mark" in faults[0].detail


def test_a_command_that_fails_is_reported_however_late(write_shard: WriteShard) -> None:
    path = shlex.quote(str(write_shard("whole.tar", 3)))
    assert read(f"pipe:cat {path}")[1] == []
    for command, said in (
        (f"cat {path}; exit 3", "status 3"),
        (f"cat {path}; sleep 0.3; exit 3", "status 3"),
        (f"head -c 5000 {path}; exit 4", "status 4"),
        ("cat /nowhere 2>/dev/null", "status 1"),
        ("kill -9 $$", "status -9"),
    ):
        _, faults = read(f"pipe:{command}")
        assert len(faults) == 1, command
        assert said in faults[0].detail


def test_compressed_shards_are_read_and_a_cut_is_reported(write_shard: WriteShard, tmp_path: Path) -> None:
    packed = gzip.compress(write_shard("whole.tar", 5).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(packed)
    assert read(f"pipe:cat {tmp_path}/a.tar.gz") == ([f"{number:09d}" for number in range(5)], [])
    for cut in (0, 10, len(packed) // 2, len(packed) * 3 // 4):
        (tmp_path / "a.tar.gz").write_bytes(packed[:cut])
        assert len(read(f"pipe:cat {tmp_path}/a.tar.gz")[1]) == 1


def test_samples_that_cannot_be_used_come_with_the_batch(
    write_shard: WriteShard, tokenizer: ClipTokenizer, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    samples = [
        {"__key__": "good", "png": picture(0), "txt": b"words"},
        {"__key__": "fine", "png": picture(1), "txt": b"words"},
        {"__key__": "broken", "png": picture(2)[:60], "txt": b"words"},
        {"__key__": "silent", "png": picture(3), "txt": b" "},
        {"__key__": "blind", "txt": b"words"},
        {"__key__": "latin", "png": picture(4), "txt": b"\xe9"},
        {"__key__": "json", "png": picture(5), "txt": b"words", "json": b"["},
        {"__key__": "double", "png": picture(6), "jpg": picture(6), "txt": b"words"},
    ]
    stream = StreamBatches(
        write_shard("mixed.tar", samples), PREPROCESS, tokenizer, batch_size=4, shuffle=4, workers=1
    )
    batches = iter(stream)
    taken = list(islice(batches, 5))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    good = {stream_id(str(tmp_path / "mixed.tar"), key) for key in ("good", "fine")}
    assert set(ids(taken)) == good
    found = Counter((bad.key, bad.reason) for batch in taken for bad in batch.faults)
    assert set(found) == {
        ("broken", "picture undecodable"),
        ("silent", "empty caption"),
        ("blind", "missing picture"),
        ("latin", "caption is not UTF-8"),
        ("json", "invalid json"),
        ("double", "several pictures"),
    }
    assert max(found.values()) > 1
    assert sum(stream.quarantine.counts().values()) == 6  # each once


def test_a_shard_that_is_gone_is_reported_and_others_go_on(shards: Path, server: FlakyServer) -> None:
    server.put("a.tar", (shards / "00000.tar").read_bytes())
    batches = take(20, [f"{server.url}/a.tar", f"{server.url}/gone.tar"], shuffle=1)
    faults = [fault for batch in batches for fault in batch.faults]
    assert {fault.reason for fault in faults} == {"shard cannot be read"}
    assert all(fault.shard == f"{server.url}/gone.tar" for fault in faults)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_gives_nothing_stops(write_shard: WriteShard, workers: int) -> None:
    with pytest.raises(DataError, match=r"10 shards in a row gave no sample.*status 1"):
        take(1, "pipe:exit 1", workers=workers)
    with pytest.raises(DataError, match=r"10 shards in a row gave no sample.*holds no sample"):
        take(1, write_shard("empty.tar", 0), workers=workers)
    bad = write_shard("bad.tar", [{"__key__": f"{number}", "png": b"no picture"} for number in range(9)])
    with pytest.raises(DataError, match="100 samples in a row cannot be read"):
        take(1, bad, workers=workers)
