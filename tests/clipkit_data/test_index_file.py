"""Index files: the same as a scan, whole or refused, and a guard over every byte of a shard."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import DataError
from clipkit.files import sha256_file
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import RecordError
from clipkit_data.shards.index_file import SampleTable, in_columns, index_path, parse_index, read_index
from clipkit_data.shards.sample import Sample, crc32_of
from clipkit_data.shards.scan import check_shard, scan_shard
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.check import check_in_processes
from clipkit_data.tools.indexing import index_shard, index_shards
from tests.clipkit_data.flaky_server import flaky_server

NAMES = st.sampled_from(["jpg", "png", "txt", "json", "cls", "seg.png"])
KEYS = st.sampled_from(["a", "b", "0001", "深/い", "d/" + "k" * 110])
MEMBERS = st.lists(st.tuples(KEYS, NAMES, st.binary(max_size=700)), max_size=14)


def tar_of(path: Path, members: Sequence[tuple[str, str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, name, data in members:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def bare(samples: Sequence[Sample]) -> list[tuple[str, list, int]]:
    return [(sample.key, list(sample.members.items()), sample.header) for sample in samples]


@given(members=MEMBERS, cut=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_is_read_from_the_file_is_what_the_scan_found(
    members: list[tuple[str, str, bytes]], cut: int
) -> None:
    """Also of shards with faults: missing, repeated, torn apart, cut."""
    with tempfile.TemporaryDirectory() as folder:
        path = tar_of(Path(folder) / "00000.tar", members)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - cut * 4096])
        scan = scan_shard(path)
        index_shard(path)
        index = read_index(path, path.stat().st_size)
        assert index is not None
        assert bare(index.samples) == bare(scan.samples)
        assert index.faults == scan.faults
        assert (index.groups, index.bytes) == (scan.groups, scan.bytes)
        assert in_columns(index.samples).digest == in_columns(scan.samples).digest
        for sample in index.samples:
            data = [whole[offset : offset + size] for offset, size in sample.members.values()]
            assert sample.crc32 == crc32_of(data)


def test_the_file_has_the_columns_that_are_promised(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 3)
    index_shard(path)
    table = pq.read_table(path.with_name("00000_index.parquet"))
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("key", "string"),
        ("header", "int64"),
        ("members", "list<element: struct<extension: string, offset: int64, size: int64>>"),
        ("crc32", "uint32"),
    ]
    meta = json.loads(table.schema.metadata[b"clipkit"])
    assert (meta["format"], meta["bytes"], meta["groups"], meta["faults"]) == (1, path.stat().st_size, 3, [])
    with tarfile.open(path) as tar:
        names = [f"{row['key']}.{part['extension']}" for row in table.to_pylist() for part in row["members"]]
        assert names == tar.getnames()
        headers = [member.offset for member in tar if member.name.endswith(".json")]
    assert table.column("header").to_pylist() == headers


def test_samples_in_columns_behave_like_a_list(write_shard: Callable[..., Path]) -> None:
    scan = scan_shard(write_shard("00000.tar", 5)).samples
    table = in_columns(scan)
    assert list(table) == list(scan)
    assert (table[-1], table[1:3]) == (scan[-1], list(scan[1:3]))
    assert table.extensions == ["json", "png", "txt"]
    with pytest.raises(IndexError):
        table[5]
    assert len(in_columns([])) == 0


def test_the_digest_follows_keys_names_places_and_sizes() -> None:
    samples = [Sample("a", {"jpg": (512, 3)}, 0), Sample("b", {"jpg": (1536, 3), "txt": (2560, 4)}, 1024)]
    others = [
        [Sample("c", samples[0].members, 0), samples[1]],
        [Sample("a", {"png": (512, 3)}, 0), samples[1]],
        [Sample("a", {"jpg": (512, 4)}, 0), samples[1]],
        [Sample("a", {"jpg": (1024, 3)}, 0), samples[1]],
        samples[:1],
        samples[::-1],
        [Sample("a", {"jpg": (512, 3), "txt": (1536, 3)}, 0), Sample("b", {"jpg": (2560, 4)}, 1024)],
    ]
    digests = {in_columns(each).digest for each in (samples, *others)}
    assert len(digests) == 8


def test_a_damaged_index_file_is_never_believed(
    write_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever byte of it is flipped: refused, or every value is still what it was."""
    path = write_shard("00000.tar", 4)
    index_shard(path)
    whole = index_path(path).read_bytes()
    sound = parse_index(whole, "index", "shard")
    refused = 0
    for offset in range(0, len(whole), 3):
        data = bytearray(whole)
        data[offset] ^= 0x04
        try:
            index = parse_index(bytes(data), "index", "shard")
        except DataError:
            refused += 1
            continue
        assert list(index.samples) == list(sound.samples), offset
    assert refused > len(whole) // 6
    index_path(path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"00000_index\.parquet: the index file is damaged") as caught:
        read_index(path)
    assert caught.value.hint == "run `clipkit shards index` on the shards"
    dataset = ShardDataset([path])
    assert len(dataset) == 4
    assert "the shard is scanned instead" in caplog.text
    index_shards(path)
    assert index_path(path).read_bytes() == whole


def test_an_index_of_a_newer_format_is_named(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 1)
    index_shard(path)
    table = pq.read_table(index_path(path))
    meta = json.loads(table.schema.metadata[b"clipkit"]) | {"format": 2}
    pq.write_table(table.replace_schema_metadata({b"clipkit": json.dumps(meta)}), index_path(path))
    with pytest.raises(DataError, match="format 2 is newer"):
        read_index(path)


@pytest.fixture
def indexed(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """A shard of two small samples with its index file."""
    members = [
        (key, *part) for key in "ab" for part in (("png", picture(1, 8)), ("txt", b"w"), ("cls", b"1"))
    ]
    path = tar_of(tmp_path / "00000.tar", members)
    index_shards(path)
    return path


def keep_time(path: Path, data: bytes) -> None:
    """Change a file as a failing disk does: size and time stay."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_every_flipped_byte_of_a_shard_is_reported(indexed: Path) -> None:
    whole = indexed.read_bytes()
    owner = {
        place: sample.key
        for sample in scan_shard(indexed).samples
        for offset, size in sample.members.values()
        for place in range(offset, offset + size)
    }
    assert check_shard(indexed).faults == []
    for offset in range(len(whole)):
        if offset not in owner and offset % 17:  # headers and padding are tested at every byte elsewhere
            continue
        data = bytearray(whole)
        data[offset] ^= 0x01
        keep_time(indexed, bytes(data))
        faults = check_shard(indexed).faults
        assert faults, f"byte {offset} passed unseen"
        if offset in owner:
            assert [(fault.sample, fault.reason) for fault in faults] == [(owner[offset], "CRC")]


def test_a_flipped_byte_is_noticed_when_the_sample_is_read(indexed: Path) -> None:
    whole = bytearray(indexed.read_bytes())
    offset, _ = scan_shard(indexed).samples[1].members["cls"]  # a member that no record shows
    whole[offset] ^= 0x80
    keep_time(indexed, bytes(whole))
    dataset = ShardDataset([indexed])
    assert dataset[0].caption == "w"
    with pytest.raises(
        RecordError, match=rf"00000\.tar: b: the bytes from offset {offset - 2048} on"
    ) as caught:
        dataset[1]
    assert caught.value.reason == "CRC"


def test_a_shard_cut_at_any_block_is_reported(indexed: Path) -> None:
    whole = indexed.read_bytes()
    for length in range(0, len(whole), 512):
        keep_time(indexed, whole[:length])
        reasons = {fault.reason for fault in check_shard(indexed, decode=False).faults}
        assert "index file" in reasons, length  # its size is not the one that was indexed
        assert len(reasons) > 1 or length == len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512 + 1024


def test_check_says_when_the_index_is_of_other_samples(indexed: Path, picture: Callable[..., bytes]) -> None:
    """Another shard of the same size under the same name."""
    keep_time(indexed, indexed.read_bytes().replace(b"w", b"v"))
    members = [
        (key, *part) for key in "xy" for part in (("png", picture(1, 8)), ("txt", b"w"), ("cls", b"1"))
    ]
    tar_of(indexed, members)
    faults = check_shard(indexed).faults
    assert [fault.reason for fault in faults] == ["index file"]
    assert "lists other samples" in faults[0].detail


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_shard_elsewhere_is_checked_with_what_lies_beside_it_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, jobs: int
) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    for path in resolve_shards(shards):
        stats = {"successes": 7, "sha256": sha256_file(path)}  # of the second wrong: it holds 6
        Path(path).with_name(f"{Path(path).stem}_stats.json").write_text(json.dumps(stats))
    index_shards(shards)
    path = shards / "00000.tar"
    keep_time(path, path.read_bytes().replace(b"caption 3", b"XXXXion 3"))
    here = list(check_in_processes(resolve_shards(shards), jobs=jobs))
    reasons = [[fault["reason"] for fault in faults] for faults, _ in here]
    assert reasons == [["CRC", "SHA-256"], ["number of samples"]]
    with flaky_server() as server:
        for path in shards.iterdir():
            server.put(f"set/{path.name}", path.read_bytes())
        urls = [f"{server.url}/set/0000{number}.tar?signature=secret" for number in range(2)]
        there = list(check_in_processes(urls, jobs=jobs))
        assert json.loads(json.dumps(there).replace(f"{server.url}/set", str(shards))) == [*map(list, here)]
        assert not caplog.records
        server.put("set/00001_stats.json", b"{}")
        for number in range(2):
            del server.files[f"set/0000{number}_index.parquet"]
        assert [len(faults) for faults, _ in check_in_processes(urls, jobs=jobs)] == [1, 0]
        (record,) = caplog.records
        assert (
            "set/00001.tar: its checksums were not compared: no index file lies beside it; run"
            in record.getMessage()
        )
        caplog.clear()
        assert [faults for faults, _ in check_in_processes(urls, decode=False, jobs=jobs)] == [[], []]
        assert not caplog.records, "none was asked for"


def test_columns_take_little_memory() -> None:
    table = in_columns(
        [Sample(f"{n:09d}", {"jpg": (n * 2048, 30_000), "txt": (n, 20)}, n) for n in range(5000)]
    )
    columns = (table._ends, table._codes, table._offsets, table._sizes, table._headers)
    assert isinstance(table, SampleTable)
    assert (sum(column.nbytes for column in columns) + table._keys.nbytes) / 5000 < 80
