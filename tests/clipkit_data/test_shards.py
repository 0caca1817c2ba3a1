"""Scanning and checking shards: other writers' shards are read, and every kind of fault is named."""

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from clipkit.errors import NotFoundError
from clipkit_data.dataset import ShardDataset
from clipkit_data.shards.sample import contents_of
from clipkit_data.shards.scan import check_shard, check_shards, scan_shard, split_name
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.indexing import index_shards


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def reasons(path: Path, *, decode: bool = False) -> list[tuple[str | None, str]]:
    return [(fault.sample, fault.reason) for fault in check_shard(path, decode=decode).faults]


def test_reads_what_webdataset_writes(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 5)
    index = scan_shard(path)
    assert not index.faults
    assert check_shards([path]) == []
    data = path.read_bytes()
    with path.open("rb") as file:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        theirs = list(webdataset.tariterators.group_by_keys(files))
    assert [sample.key for sample in index.samples] == [sample["__key__"] for sample in theirs]
    for ours, other in zip(index.samples, theirs, strict=True):
        assert contents_of(ours.members) == [["png"]]
        assert set(ours.members) == {"png", "txt", "json"}
        for extension, (offset, size) in ours.members.items():
            assert data[offset : offset + size] == other[extension]


def test_reads_the_layout_of_img2dataset(
    tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    """As its WebDataset writer leaves it: gaps in the keys where downloads failed, statistics beside."""
    samples, rows = [], []
    for number in range(10_000, 10_006):
        meta = {"url": f"http://host/{number}", "key": f"{number:09d}", "status": "success", "exif": "{}"}
        if number % 3 == 1:
            meta["status"] = "failed_to_download"
        else:
            body = {"jpg": picture(number, kind="JPEG"), "txt": b"words", "json": json.dumps(meta).encode()}
            samples.append({"__key__": meta["key"], **body})
        rows.append(meta)
    path = write_shard("out/00001.tar", samples)
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    stats = {"count": 6, "successes": 4, "failed_to_download": 2, "failed_to_resize": 0}
    path.with_name("00001_stats.json").write_text(json.dumps(stats))
    paths = resolve_shards(path.parent)
    assert paths == [path]
    assert check_shards(paths) == []
    index_shards(path.parent)  # its own parquet file keeps its name
    assert check_shards(paths) == []
    assert pq.read_table(path.with_suffix(".parquet")).num_rows == 6
    dataset = ShardDataset(paths)
    assert [dataset.key(position) for position in range(4)] == [sample["__key__"] for sample in samples]
    assert dataset[2].meta["url"] == f"http://host/{int(dataset.key(2))}"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, picture: Callable[..., bytes], form: int) -> None:
    folder = "深い/" + "folder/" * 8 if form != tarfile.USTAR_FORMAT else "folder/" * 8
    name = folder + "x" * 90
    members = [(f"{name}.png", picture(1)), (f"{name}.txt", b"words")]
    index = scan_shard(write_tar(tmp_path / "a.tar", members, format=form))
    assert not index.faults
    assert [sample.key for sample in index.samples] == [name]


def test_reads_gnu_tar_with_folders_and_long_names(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    folder = tmp_path / "in" / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    path = tmp_path / "gnu.tar"
    subprocess.run(["tar", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    index = scan_shard(path)
    assert not index.faults
    assert [sample.key.rsplit("/", 1)[1] for sample in index.samples] == ["0", "1", "2"]


def test_archive_without_record_padding_is_sound(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 3)
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512 + 1024))
    assert reasons(path) == []


def test_pictures_alone_are_sound(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    members = [(f"{n}.jpg", picture(n, kind="JPEG")) for n in range(3)]
    index = check_shard(write_tar(tmp_path / "a.tar", members))
    assert not index.faults
    assert len(index.samples) == 3


def test_metadata_members_are_passed_over(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    members = [("__info__/about.json", b"{}"), ("0.png", picture(0)), ("0.txt", b"words")]
    assert reasons(write_tar(tmp_path / "a.tar", members)) == []


def test_members_missing_or_twice(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    image = picture(0)
    members = [
        ("whole.png", image), ("whole.txt", b"a"), ("whole.json", b"{}"),
        ("blind.txt", b"b"), ("blind.json", b"{}"),
        ("mute.png", image), ("mute.json", b"{}"),
        ("bare.png", image), ("bare.txt", b"c"),
        ("both.png", image), ("both.jpg", image), ("both.txt", b"d"), ("both.json", b"{}"),
        ("twice.png", image), ("twice.png", image), ("twice.txt", b"e"), ("twice.json", b"{}"),
        ("noextension", b"?"),
    ]  # fmt: skip
    index = scan_shard(write_tar(tmp_path / "a.tar", members))
    assert {(fault.sample, fault.reason) for fault in index.faults} == {
        ("blind", "missing picture"),
        ("mute", "missing caption"),
        ("bare", "missing json"),
        ("both", "several pictures"),
        ("twice", "duplicate member"),
        (None, "member name"),
    }
    assert [sample.key for sample in index.samples] == ["whole", "bare"]
    assert all(fault.offset is not None and fault.offset % 512 == 0 for fault in index.faults)


def test_what_was_there_in_place_of_a_picture_is_said(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    members = [
        ("good.jpg", picture(0, kind="JPEG")), ("good.txt", b"a"),
        ("new.avif", b"?"), ("new.txt", b"b"),
        ("raw.ppm", b"?"), ("raw.txt", b"c"),
        ("pair.input.jpg", picture(1, kind="JPEG")), ("pair.txt", b"d"),
        ("both.jpg", picture(2, kind="JPEG")), ("both.png", picture(2)), ("both.txt", b"e"),
    ]  # fmt: skip
    index = scan_shard(write_tar(tmp_path / "a.tar", members))
    assert [(fault.sample, fault.reason, fault.detail) for fault in index.faults] == [
        ("new", "missing picture", "it has avif, txt"),
        ("raw", "missing picture", "it has ppm, txt"),
        ("pair", "missing picture", "it has input.jpg, txt"),
        ("both", "several pictures", "it has jpg, png, txt"),
    ]


def test_torn_and_repeated_keys(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    image = picture(0)
    torn = [("a.png", image), ("b.png", image), ("b.txt", b"b"), ("a.txt", b"a")]
    index = scan_shard(write_tar(tmp_path / "torn.tar", torn))
    assert [sample.key for sample in index.samples] == ["b"]
    assert [(fault.sample, fault.reason) for fault in index.faults] == [("a", "members are not adjacent")]
    twice = [
        ("a.png", image),
        ("a.txt", b"1"),
        ("b.png", image),
        ("b.txt", b"b"),
        ("a.png", image),
        ("a.txt", b"2"),
    ]
    index = scan_shard(write_tar(tmp_path / "twice.tar", twice))
    assert [sample.key for sample in index.samples] == ["a", "b"]
    assert [(fault.sample, fault.reason) for fault in index.faults] == [("a", "duplicate key")]


def test_links_and_compressed_archives(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert reasons(path) == [("0", "member is no regular file")]
    packed = write_tar(tmp_path / "b.tar", [("0.png", picture(0))]).read_bytes()
    path.write_bytes(gzip.compress(packed))
    assert reasons(path) == [(None, "compressed archive")]


def test_data_behind_the_end_is_reported(write_shard: Callable[..., Path], tmp_path: Path) -> None:
    first, second = write_shard("a.tar", 2), write_shard("b.tar", 2, start=2)
    path = tmp_path / "joined.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert reasons(path) == [(None, "data after the end-of-archive marker")]


def test_content_is_checked(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    image = picture(0, side=64)
    members = []
    for key, data, text, meta in [
        ("fine", image, b"words", b"{}"),
        ("cut", image[: len(image) // 2], b"words", b"{}"),
        ("text", b"hello", b"words", b"{}"),
        ("void", b"", b"words", b"{}"),
        ("mute", image, b" \n", b"{}"),
        ("latin", image, "né".encode("latin-1"), b"{}"),
        ("list", image, b"words", b"[1]"),
        ("broken", image, b"words", b"{"),
    ]:
        members += [(f"{key}.png", data), (f"{key}.txt", text), (f"{key}.json", meta)]
    path = write_tar(tmp_path / "a.tar", members)
    assert reasons(path) == []
    assert reasons(path, decode=True) == [
        ("cut", "picture undecodable"),
        ("text", "picture format"),
        ("void", "picture empty"),
        ("mute", "empty caption"),
        ("latin", "caption is not UTF-8"),
        ("list", "invalid json"),
        ("broken", "invalid json"),
    ]


def test_stats_beside_the_shard_are_compared(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 3)
    stats = path.with_name("00000_stats.json")
    stats.write_text(json.dumps({"count": 5, "successes": 3}))
    assert reasons(path, decode=True) == []
    stats.write_text(json.dumps({"count": 5, "successes": 5, "sha256": "0" * 64}))
    assert reasons(path, decode=True) == [(None, "number of samples"), (None, "SHA-256")]
    stats.write_text("[]")
    assert reasons(path, decode=True) == [(None, "invalid stats")]


def test_sizes_of_open_clip_in_the_folder_are_compared(write_shard: Callable[..., Path]) -> None:
    paths = [write_shard(f"0000{number}.tar", 3) for number in range(3)]
    sizes = paths[0].with_name("sizes.json")
    sizes.write_text(json.dumps({"00000.tar": 3, "00001.tar": 4}))
    assert [reasons(path) for path in paths] == [[], [(None, "number of samples")], []]
    assert check_shard(paths[1]).faults[0].detail == "sizes.json says 4, the shard holds 3"
    sizes.write_text(json.dumps({"00000.tar": 3, "00001.tar": 3, "more": 1}))
    assert [fault.reason for fault in ShardDataset(paths).faults] == []
    sizes.write_text("{")
    assert reasons(paths[0]) == [(None, "invalid stats")]


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.tar"):
        scan_shard(tmp_path / "nothing.tar")


@pytest.mark.parametrize("name", ["a.jpg", "d/a.b.jpg", "d.e/a.JPG", "d/.hidden", "plain", "d.e/plain", "a."])
def test_names_split_as_in_webdataset(name: str) -> None:
    prefix, suffix = webdataset.tariterators.base_plus_ext(name)
    expected = (prefix, suffix.lower()) if prefix is not None and suffix is not None else None
    assert split_name(name) == expected
