"""Megatron-Energon's `.tar.idx`: written as it writes it, read where there is no index of our own."""

import os
import re
import struct
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from clipkit.errors import DataError
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import RecordError
from clipkit_data.shards.energon import energon_path, export_energon_index, read_energon_index
from clipkit_data.tools.indexing import index_shards

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


def energon_offsets(path: Path) -> list[int]:
    """What `energon prepare` writes, after `WebdatasetPreparator._preprocess_tar` of its version 7.4.1."""
    offsets, last = [], None
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
        for member in tar:
            match = _NAME.match(member.name)
            if not member.isreg() or _META.match(member.name) or match is None:
                continue
            if last != match[1]:
                offsets.append(member.offset)
                last = match[1]
        offsets.append(tar.offset)
    return offsets


FORMS = [
    (tarfile.USTAR_FORMAT, {}),
    (tarfile.GNU_FORMAT, {}),
    (tarfile.PAX_FORMAT, {}),
    (tarfile.PAX_FORMAT, {"comment": "of the whole archive"}),
]


@pytest.mark.parametrize(("form", "headers"), FORMS, ids=["ustar", "gnu", "pax", "global"])
def test_the_file_is_the_one_that_energon_writes(tmp_path: Path, form: int, headers: dict[str, str]) -> None:
    path = tmp_path / "00000.tar"
    long = "d/" * 30 + "x" * (60 if form == tarfile.USTAR_FORMAT else 120)
    with tarfile.open(path, "w", format=form, pax_headers=headers) as tar:
        for key in ("__info__/about", "a", long, "b.c", "plain", "d"):
            names = [key] if key == "plain" else [f"{key}.jpg", f"{key}.seg.png", f"{key}.txt"]
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = 700 if name.endswith("jpg") else 0
                tar.addfile(info, BytesIO(bytes(info.size)))
    data = export_energon_index(path).read_bytes()
    assert energon_path(path).name == "00000.tar.idx"
    offsets = [number for (number,) in struct.iter_unpack("<Q", data)]
    assert offsets == energon_offsets(path)
    assert len(offsets) == 5


@pytest.fixture
def with_idx(shards: Path) -> Path:
    """The two shards of `shards`, with a `.tar.idx` each."""
    for path in shards.glob("*.tar"):
        export_energon_index(path)
    return shards


def opened(folder: Path) -> ShardDataset:
    return ShardDataset(sorted(folder.glob("*.tar")))


def test_records_by_the_idx_are_those_of_a_scan(with_idx: Path) -> None:
    by_idx = opened(with_idx)
    assert all(read_energon_index(path) for path in with_idx.glob("*.tar"))
    for path in with_idx.glob("*.idx"):
        path.unlink()
    scanned = opened(with_idx)
    assert by_idx.sizes.tolist() == scanned.sizes.tolist() == [7, 6]
    assert by_idx.has_captions
    assert [by_idx[n] for n in range(13)] == [scanned[n] for n in range(13)]
    assert [by_idx.key(n) for n in range(13)] == [scanned.key(n) for n in range(13)]
    assert [list(shard.samples) for shard in by_idx.shards] == [
        list(shard.samples) for shard in scanned.shards
    ]
    assert by_idx.fingerprint() != scanned.fingerprint()  # nothing is known of members yet


def test_only_the_headers_of_the_sample_that_is_read_are_read(with_idx: Path) -> None:
    """A damaged header costs its own sample, when it is read, and says where it is."""
    path = with_idx / "00000.tar"
    offsets = energon_offsets(path)
    data = bytearray(path.read_bytes())
    data[offsets[3] + 5] ^= 0x01
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    dataset = opened(with_idx)
    assert len(dataset) == 13
    assert not dataset.faults
    with pytest.raises(RecordError, match=f"header checksum at offset {offsets[3]}") as caught:
        dataset[3]
    assert caught.value.reason == "header checksum"
    assert dataset.key(3) == f"offset {offsets[3]}"
    assert (dataset[2].key, dataset[4].key) == ("000000002", "000000004")


def test_samples_that_are_none_are_faults_when_they_are_read(
    write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    image = picture(0)
    samples = [
        {"__key__": "blind", "txt": b"words"},
        {"__key__": "both", "png": image, "jpg": image, "txt": b"words"},
        {"__key__": "fine", "png": image, "txt": b"words"},
    ]
    path = write_shard("00000.tar", samples)
    export_energon_index(path)
    dataset = ShardDataset([path])
    for position, reason in enumerate(("missing picture", "several pictures")):
        with pytest.raises(RecordError) as caught:
            dataset[position]
        assert caught.value.reason == reason
    assert dataset[2].key == "fine"
    assert [[sample.key for sample in shard.samples] for shard in dataset.shards] == [["fine"]]


def test_an_idx_that_does_not_fit_is_passed_over(with_idx: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = with_idx / "00000.tar"
    whole, index = path.read_bytes(), energon_path(path).read_bytes()
    energon_path(path).write_bytes(index[:-8])  # one sample short
    assert len(opened(with_idx)) == 13
    assert "00000.tar.idx does not fit the shard" in caplog.text
    for bad in (b"", index[:-3], index[::-1], index[8:16]):
        energon_path(path).write_bytes(bad)
        assert read_energon_index(path) is None
    energon_path(path).write_bytes(index)
    path.write_bytes(whole[: len(whole) // 2 // 512 * 512])  # the shard was cut
    assert read_energon_index(path) is None


def test_our_own_index_goes_first(with_idx: Path) -> None:
    plain = opened(with_idx).fingerprint()
    index_shards(with_idx)
    assert opened(with_idx).fingerprint() != plain


def test_damaged_shards_get_no_idx(write_shard: Callable[..., Path]) -> None:
    path = write_shard("00000.tar", 3)
    path.write_bytes(path.read_bytes()[:4096])
    with pytest.raises(DataError, match=r"no \.tar\.idx for damaged shards"):
        export_energon_index(path)
    assert not energon_path(path).exists()
