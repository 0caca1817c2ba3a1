"""The manifest: written with the index files, kept up to date, and enough to open a folder of shards."""

import json
import logging
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from uuid import uuid4

import fsspec
import pytest
import webdataset
from webdataset.writer import ShardWriter

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit.files import sha256_file
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import RecordError
from clipkit_data.remote.cache import ShardFiles
from clipkit_data.shards.index_file import index_path
from clipkit_data.shards.manifest import MANIFEST, parse_manifest
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.check import check_manifests
from clipkit_data.tools.indexing import index_shards


def opened(folder: Path) -> ShardDataset:
    return ShardDataset(resolve_shards(folder))


def later(path: Path, seconds: float = 60) -> None:
    """Let a file be written some time from now."""
    moment = time.time() + seconds
    os.utime(path, (moment, moment))


def test_indexing_sums_up_the_folder(shards: Path) -> None:
    scanned = opened(shards)
    done: list[int] = []
    result = index_shards(shards, progress=done.append)
    assert result == {"shards": 2, "samples": 13, "faults": [], "manifest": str(shards / MANIFEST)}
    assert done == [1, 1]
    manifest = json.loads((shards / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["shards"] == opened(shards).manifest()
    assert all(len(shard.pop("contents")) == 64 for shard in manifest["shards"])
    assert manifest["shards"] == scanned.manifest()
    first = manifest["shards"][0]
    assert (first["name"], first["samples"], first["faults"]) == ("00000.tar", 7, 0)
    assert first["bytes"] == (shards / "00000.tar").stat().st_size
    assert first["extensions"] == ["json", "png", "txt"]


def test_records_and_fingerprint_are_the_same_with_an_index(shards: Path) -> None:
    scanned = opened(shards)
    index_shards(shards)
    by_manifest = opened(shards)
    (shards / MANIFEST).unlink()
    by_files = opened(shards)
    for dataset in (by_manifest, by_files):
        assert [dataset[n] for n in range(13)] == [scanned[n] for n in range(13)]
        assert dataset.fingerprint() == scanned.fingerprint()
        assert dataset.sizes.tolist() == scanned.sizes.tolist() == [7, 6]
        assert dataset.has_captions


def test_opening_by_the_manifest_reads_no_shard_and_no_index(shards: Path) -> None:
    """The shards' bytes are gone, their sizes and times are not: that shows at the first read alone."""
    index_shards(shards)
    whole = opened(shards)
    for path in shards.glob("*.tar"):
        status = path.stat()
        path.write_bytes(b"")
        os.truncate(path, status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for path in shards.glob("*.parquet"):
        status = path.stat()
        path.write_bytes(b"")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    dataset = opened(shards)
    assert len(dataset) == 13
    assert dataset.fingerprint() == whole.fingerprint()
    assert dataset.shard_names == ["00000.tar", "00001.tar"]
    with pytest.raises(DataError, match="holds other samples"):
        dataset[0]


def test_opening_by_the_manifest_reads_indexes_one_by_one(shards: Path) -> None:
    index_shards(shards)
    index_path(shards / "00000.tar").write_bytes(b"damaged")
    dataset = opened(shards)
    assert dataset[8].caption == "caption 8"
    assert list(dataset._read) == [1]
    assert dataset[1].caption == "caption 1"  # by a scan, which agrees with the manifest


def test_indexes_that_were_long_not_used_are_forgotten(
    write_shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit_data.dataset._KEPT_SAMPLES", 5)
    for number in range(4):
        write_shard(f"many/{number:05d}.tar", 2, start=2 * number)
    index_shards(tmp_path / "many")
    dataset = opened(tmp_path / "many")
    captions = [dataset[position].caption for position in (0, 2, 4, 6, 1, 3)]
    assert captions == [f"caption {n}" for n in (0, 2, 4, 6, 1, 3)]
    assert list(dataset._read) == [0, 1]


def test_a_shard_that_changed_after_indexing_is_scanned_again(
    shards: Path, write_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    index_shards(shards)
    old = opened(shards)
    assert not caplog.text
    write_shard("shards/00000.tar", 9, start=100)  # another size
    later(shards / "00000.tar")
    dataset = opened(shards)
    assert dataset.sizes.tolist() == [9, 6]
    assert dataset[0].caption == "caption 100"
    assert "00000.tar changed after it was indexed" in caplog.text
    assert dataset.fingerprint() != old.fingerprint()
    with pytest.raises((DataError, RecordError)):
        old[6]
    index_shards(shards)
    os.utime(index_path(shards / "00000.tar"), ns=(0, (shards / "00000.tar").stat().st_mtime_ns))
    again = opened(shards)
    assert again.fingerprint() == dataset.fingerprint()
    assert not again._kept  # nothing was scanned


def test_what_changed_in_place_is_read_once_it_is_indexed_again(shards: Path) -> None:
    index_shards(shards)
    path = shards / "00000.tar"
    path.write_bytes(path.read_bytes().replace(b"caption 3", b"caption X"))
    later(path)
    with pytest.raises(RecordError, match="CRC"):
        opened(shards)[3]
    assert opened(shards)[2].caption == "caption 2"
    index_shards(shards)
    after = path.stat().st_mtime + 1
    os.utime(index_path(path), (after, after))
    assert opened(shards)[3].caption == "caption X"


def test_other_contents_of_the_same_size_are_known_by_the_manifest(shards: Path) -> None:
    index_shards(shards)
    path, before = shards / "00000.tar", (shards / MANIFEST).read_bytes()
    path.write_bytes(path.read_bytes().replace(b"caption 3", b"noitpac 3"))
    index_shards(shards)
    first, second = opened(shards).manifest()
    old = parse_manifest(before, "m")
    assert first["digest"] == old["00000.tar"].digest
    assert first["contents"] != old["00000.tar"].contents
    assert second["contents"] == old["00001.tar"].contents
    (shards / MANIFEST).unlink()
    assert opened(shards).manifest() == [first, second]
    (shards / MANIFEST).write_bytes(before)  # as an interrupted `clipkit shards index` leaves it
    with pytest.raises(DataError, match="holds other samples than its folder's manifest"):
        opened(shards)[3]
    assert opened(shards)[9].caption == "caption 9"


def test_a_manifest_that_knows_nothing_of_contents_is_read(shards: Path) -> None:
    index_shards(shards)
    manifest = json.loads((shards / MANIFEST).read_text())
    for shard in manifest["shards"]:
        del shard["contents"]
    (shards / MANIFEST).write_text(json.dumps(manifest))
    dataset = opened(shards)
    assert dataset.manifest() == manifest["shards"]
    assert dataset[3].caption == "caption 3"


def missing(spec: object) -> list[tuple[str, str]]:
    return [(fault["shard"], fault["reason"]) for fault in check_manifests(resolve_shards(str(spec)))]


def test_a_shard_that_the_manifest_lists_and_that_is_gone_is_noticed(
    shards: Path, write_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    write_shard("shards/00002.tar", 3, start=20)
    index_shards(shards)
    assert missing(shards) == []
    (shards / "00001.tar").unlink()
    assert missing(shards) == missing(shards / "*.tar") == [(str(shards / "00001.tar"), "missing shard")]
    assert opened(shards).sizes.tolist() == [7, 3]
    (record,) = caplog.records
    assert "manifest.json lists shards that are not there (00001.tar): put back" in record.getMessage()
    caplog.clear()
    assert missing(shards / "00002.tar") == [], "a part was asked for, and it is there"
    assert opened(shards / "00002.tar").sizes.tolist() == [3]
    index_shards(shards)
    assert missing(shards) == []
    assert len(opened(shards)) == 10
    assert not caplog.records


def test_a_shard_that_is_gone_from_a_store_is_noticed(
    shards: Path, tmp_path: Path, write_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    memory, root = fsspec.filesystem("memory"), f"memory://{uuid4().hex}"
    write_shard("shards/00002.tar", 3, start=20)
    index_shards(shards)
    for path in shards.iterdir():
        memory.pipe_file(f"{root}/{path.name}", path.read_bytes())
    memory.rm_file(f"{root}/00001.tar")
    assert missing(root) == [(f"{root}/00001.tar", "missing shard")]
    assert len(ShardDataset(resolve_shards(root), files=ShardFiles(tmp_path / "cache"))) == 10
    assert "lists shards that are not there (00001.tar)" in caplog.text
    assert missing(f"{root}/00002.tar") == missing(f"{root}/{{00000..00000}}.tar") == []


def test_faults_that_files_beside_a_shard_tell_of_are_those_of_now(shards: Path) -> None:
    path, stats = shards / "00000.tar", shards / "00000_stats.json"
    said = {"successes": 7, "sha256": sha256_file(path)}
    stats.write_text(json.dumps(said))
    assert index_shards(shards)["faults"] == []

    def reasons() -> list[str]:
        found = [fault["reason"] for fault in index_shards(shards)["faults"]]
        assert [fault.reason for fault in opened(shards).faults] == found, "as the index file has it"
        return found

    path.write_bytes(path.read_bytes().replace(b"caption 3", b"noitpac 3"))
    assert reasons() == ["SHA-256"]
    kept = index_path(path).stat().st_mtime_ns
    assert reasons() == ["SHA-256"]
    assert index_path(path).stat().st_mtime_ns == kept, "nothing is new"
    stats.unlink()
    assert reasons() == []
    stats.write_text(json.dumps(said | {"successes": 8}))
    later(stats)
    assert reasons() == ["number of samples", "SHA-256"]
    stats.write_text(json.dumps({"successes": 7, "sha256": sha256_file(path)}))
    assert reasons() == []
    assert opened(shards)[3].caption == "noitpac 3", "the checksums are those of the shard as it is"


def test_an_interrupted_run_is_continued(shards: Path) -> None:
    index_shards(shards)
    first, second = (index_path(shards / f"0000{n}.tar") for n in range(2))
    kept = first.stat().st_mtime_ns
    second.unlink()
    (shards / MANIFEST).unlink()
    assert index_shards(shards)["samples"] == 13
    assert first.stat().st_mtime_ns == kept
    assert second.exists()
    assert len(parse_manifest((shards / MANIFEST).read_bytes(), "m")) == 2


def test_a_part_of_a_folder_keeps_the_rest_of_the_manifest(
    shards: Path, write_shard: Callable[..., Path]
) -> None:
    index_shards(shards)
    write_shard("shards/00002.tar", 3, start=20)
    write_shard("shards/00003.tar", 3, start=30)
    (shards / "00000.tar").unlink()
    result = index_shards(shards / "00002.tar")
    assert (result["shards"], result["samples"]) == (1, 3)
    entries = parse_manifest((shards / MANIFEST).read_bytes(), "m")
    assert list(entries) == ["00001.tar", "00002.tar"]
    assert opened(shards).sizes.tolist() == [6, 3, 3]  # one of them was scanned


def test_several_processes_write_the_same_files(shards: Path) -> None:
    index_shards(shards, jobs=1)
    files = [*shards.glob("*.parquet"), shards / MANIFEST]
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    result = index_shards([shards / "00000.tar", shards / "00001.tar"], jobs=2)
    assert result["samples"] == 13
    assert [path.read_bytes() for path in files] == before


def test_shards_in_two_folders_get_a_manifest_each(write_shard: Callable[..., Path]) -> None:
    paths = [write_shard("a/00000.tar", 2), write_shard("b/00000.tar", 3)]
    result = index_shards(paths)
    assert result["manifest"] == f"{paths[0].parent / MANIFEST}, {paths[1].parent / MANIFEST}"
    assert ShardDataset(paths).sizes.tolist() == [2, 3]


def test_faults_survive_without_another_scan(
    write_shard: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard("bad/00000.tar", 3)
    path = write_shard("bad/00001.tar", 5)
    path.write_bytes(path.read_bytes()[:9000])
    path.with_name("00001_stats.json").write_text(json.dumps({"successes": 5}))
    result = index_shards(tmp_path / "bad")
    reasons = [fault["reason"] for fault in result["faults"]]
    assert {"cut data", "number of samples"} <= set(reasons)
    scanned = ShardDataset([path]).faults
    path.with_name("00001_stats.json").unlink()
    with caplog.at_level(logging.WARNING):
        dataset = opened(tmp_path / "bad")
    assert dataset.faults == scanned
    assert "cut data ×1" in caplog.text
    assert not dataset._kept
    assert [entry["faults"] for entry in dataset.manifest()] == [0, len(scanned)]


def test_a_damaged_manifest_is_passed_over(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    index_shards(shards)
    for bad in ("", "[]", '{"format": 2, "shards": []}', '{"format": 1, "shards": [{"name": "00000.tar"}]}'):
        caplog.clear()
        (shards / MANIFEST).write_text(bad)
        assert len(opened(shards)) == 13
        assert str(shards / MANIFEST) in caplog.text


def test_what_cannot_be_indexed_is_said(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such shards"):
        index_shards(tmp_path / "nothing.tar")
    with pytest.raises(InputError, match="written beside its shard"):
        index_shards("https://127.0.0.1/00000.tar")
    index_shards(shards)
    (shards / "00000.tar").unlink()
    with pytest.raises(NotFoundError, match=r"no such shard: .*00000\.tar"):
        ShardDataset([shards / "00000.tar"])


def test_shards_from_webdatasets_shard_writer_and_back(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    """What its ShardWriter writes we read, indexed or not, and with our files beside it still reads it."""
    with ShardWriter(str(tmp_path / "%05d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            writer.write({"__key__": f"{number:04d}", "jpg": picture(number, kind="JPEG"), "cls": number})
    scanned = opened(tmp_path)
    index_shards(tmp_path)
    dataset = opened(tmp_path)
    assert not dataset.faults
    assert not dataset.has_captions
    assert dataset.sizes.tolist() == [4, 4, 2]
    assert [dataset[n] for n in range(10)] == [scanned[n] for n in range(10)]
    theirs = []
    for path in resolve_shards(tmp_path):
        with Path(path).open("rb") as file:
            files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            theirs += list(webdataset.tariterators.group_by_keys(files))
    assert [sample["jpg"] for sample in theirs] == [dataset[n].image for n in range(10)]
    assert [sample["__key__"] for sample in theirs] == [dataset.key(n) for n in range(10)]


def test_opening_many_indexed_shards_keeps_a_row_of_each(tmp_path: Path) -> None:
    for number in range(150):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 3
            tar.addfile(info, BytesIO(b"jpg"))
    index_shards(tmp_path)
    dataset = opened(tmp_path)
    assert len(dataset) == 150
    assert not dataset._kept
    assert not dataset._read
    assert dataset[149].image == b"jpg"
    assert list(dataset._read) == [149]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server of a folder: its URL, and the names that were asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            if self.command == "GET":
                asked.append(self.path.rsplit("/", 1)[-1])

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_remote_shards_with_a_manifest_are_fetched_when_they_are_read(shards: Path, tmp_path: Path) -> None:
    index_shards(shards)
    here = opened(shards)
    with serving(shards) as (url, asked):
        urls = [f"{url}/0000{number}.tar?token=secret" for number in range(2)]
        dataset = ShardDataset(urls, files=ShardFiles(tmp_path / "cache"))
        assert [name.partition("?")[0] for name in asked] == [MANIFEST]
        assert dataset.remote
        assert dataset.name == url
        assert dataset.shard_names == ["00000.tar", "00001.tar"]
        assert dataset.fingerprint() == here.fingerprint()
        assert dataset[9] == here[9]
        names = {name.partition("?")[0] for name in asked}
        assert names == {MANIFEST, "00001_index.parquet", "00001.tar"}


def test_remote_shards_without_an_index_are_fetched_and_scanned(shards: Path, tmp_path: Path) -> None:
    here = opened(shards)
    with serving(shards) as (url, _):
        dataset = ShardDataset(
            [f"{url}/0000{number}.tar" for number in range(2)], files=ShardFiles(tmp_path / "c")
        )
        assert dataset.sizes.tolist() == [7, 6]
        assert dataset.fingerprint() == here.fingerprint()
        assert [dataset[n] for n in range(13)] == [here[n] for n in range(13)]
        assert [shard.path for shard in dataset.shards] == dataset.paths


def test_a_fault_of_a_remote_shard_names_its_url_without_secrets(
    write_shard: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_shard("bad/00000.tar", 5)
    path.write_bytes(path.read_bytes()[:9000])
    with serving(path.parent) as (url, _):
        dataset = ShardDataset([f"{url}/00000.tar?signature=abc"], files=ShardFiles(tmp_path / "cache"))
    assert {fault.shard for fault in dataset.faults} == {f"{url}/00000.tar"}
