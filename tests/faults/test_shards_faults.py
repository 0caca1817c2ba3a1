"""Damaged shards: whatever is cut off or flipped, there is a report, and what is still whole is read."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from clipkit_data.shards.scan import ShardIndex, scan_shard


def small_shard(path: Path, form: int = tarfile.USTAR_FORMAT, samples: int = 3) -> Path:
    """A shard of a few samples; the GNU and pax ones have names that need headers of their own."""
    with tarfile.open(path, "w", format=form) as tar:
        for number in range(samples):
            buffer = BytesIO()
            Image.new("RGB", (16, 16), (number * 40, 90, 200)).save(buffer, "JPEG")
            key = f"{number:09d}" + ("y" * 100 if form != tarfile.USTAR_FORMAT else "")
            meta = json.dumps({"key": key}).encode()
            for name, data in (("jpg", buffer.getvalue()), ("json", meta), ("txt", b"words")):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return path


def contents(index: ShardIndex, data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (sample.key, {name: data[offset : offset + size] for name, (offset, size) in sample.members.items()})
        for sample in index.samples
    ]


FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("form", FORMS, ids=["ustar", "gnu", "pax"])
def test_cut_at_every_block(tmp_path: Path, form: int) -> None:
    path = small_shard(tmp_path / "00000.tar", form)
    whole = path.read_bytes()
    expected = contents(scan_shard(path), whole)
    assert len(expected) == 3
    end = len(whole.rstrip(b"\0")) + -len(whole.rstrip(b"\0")) % 512
    for length in range(0, len(whole), 512):
        path.write_bytes(whole[:length])
        index = scan_shard(path)
        found = contents(index, whole)
        assert found == expected[: len(found)], length
        if length == end + 1024:  # a complete archive of a writer that does not fill its last record
            assert found == expected
            assert not index.faults
        else:
            assert index.faults, f"cut at {length} of {len(whole)} passed unseen"


def test_cut_inside_blocks(tmp_path: Path) -> None:
    path = small_shard(tmp_path / "00000.tar", samples=1)
    whole = path.read_bytes()
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        if length % 512:
            assert scan_shard(path).faults, length


@pytest.mark.parametrize("form", FORMS, ids=["ustar", "gnu", "pax"])
def test_every_header_byte_flipped(tmp_path: Path, form: int) -> None:
    path = small_shard(tmp_path / "00000.tar", form)
    whole = path.read_bytes()
    clean = scan_shard(path)
    expected = contents(clean, whole)
    member = clean.samples[1].members["jpg"][0] - 512
    headers = [*range(member, member + 512)]
    if form != tarfile.USTAR_FORMAT:  # the header of the long name: a block of data lies between the two
        headers += range(member - 1024, member - 512)
    for offset in headers[:: 1 if form == tarfile.USTAR_FORMAT else 3]:
        for bits in (0x01, 0x20):
            data = bytearray(whole)
            data[offset] ^= bits
            path.write_bytes(data)
            index = scan_shard(path)
            assert index.faults, f"byte {offset - member} ^ {bits:#x} passed unseen"
            assert contents(index, whole) == [expected[0], expected[2]]


def test_every_byte_outside_the_data_flipped(tmp_path: Path) -> None:
    path = small_shard(tmp_path / "00000.tar", samples=2)
    whole = path.read_bytes()
    inside = {
        place
        for sample in scan_shard(path).samples
        for offset, size in sample.members.values()
        for place in range(offset, offset + size)
    }
    for offset in (place for place in range(0, len(whole), 13) if place not in inside):
        data = bytearray(whole)
        data[offset] ^= 0x10
        path.write_bytes(data)
        assert scan_shard(path).faults, f"byte {offset} passed unseen"


def test_the_rest_is_read_after_a_wiped_block(tmp_path: Path) -> None:
    path = small_shard(tmp_path / "00000.tar", samples=5)
    whole = path.read_bytes()
    expected = contents(scan_shard(path), whole)
    header = scan_shard(path).samples[2].members["txt"][0] - 512
    path.write_bytes(whole[:header] + bytes(512) + whole[header + 512 :])
    index = scan_shard(path)
    assert contents(index, whole) == [*expected[:2], *expected[3:]]
    assert [fault.reason for fault in index.faults] == ["missing caption", "zero block inside the archive"]


def test_tarfile_is_silent_where_we_report(tmp_path: Path) -> None:
    """Why there is a reader of our own: this is what Python's does with one flipped header byte."""
    path = small_shard(tmp_path / "00000.tar", samples=5)
    data = bytearray(path.read_bytes())
    data[scan_shard(path).samples[2].members["jpg"][0] - 300] ^= 1
    path.write_bytes(data)
    with tarfile.open(fileobj=BytesIO(data), mode="r|*") as tar:
        assert len(list(tar)) == 6  # of 15, without a word
    index = scan_shard(path)
    assert len(index.samples) == 4
    assert "header checksum" in {fault.reason for fault in index.faults}


def test_garbage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    for content in (b"", b"not a tar", bytes(range(256)) * 40, bytes(512)):
        path.write_bytes(content)
        index = scan_shard(path)
        assert index.faults
        assert not index.samples
