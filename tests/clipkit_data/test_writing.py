"""Writing shards: img2dataset's layout, the same bytes each time, nothing half-written."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import ConfigError
from clipkit.files import sha256_file
from clipkit_data.dataset import ShardDataset
from clipkit_data.shards.scan import check_shards
from clipkit_data.shards.writing import shard_name, write_shard, write_shards


def samples(picture: Any, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        mixed = "text" if number % 2 else number
        meta = {"number": number, "mixed": mixed, "huge": 2**70, "object": {}, "key": "not this"}
        yield {"image": picture(number), "ext": "png", "caption": f"caption {number} 图", "json": meta}


def test_layout(picture: Any, tmp_path: Path) -> None:
    shards = write_shards(samples(picture, 7), tmp_path / "out", per_shard=3)
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    dataset = ShardDataset(shards)
    records = [dataset[position] for position in range(len(dataset))]
    dataset.close()
    assert [record.key for record in records][2:4] == ["000000002", "000010000"]
    assert records[3].caption == "caption 3 图"
    assert records[3].image == picture(3)
    assert records[3].meta == {
        "key": "000010000",
        "caption": "caption 3 图",
        "status": "success",
        "number": 3,
        "mixed": "text",
        "huge": 2**70,
        "object": {},
    }
    assert check_shards(shards) == []
    table = pq.read_table(tmp_path / "out/00001.parquet")
    assert table.column("number").to_pylist() == [3, 4, 5]
    assert table.column("mixed").to_pylist() == ['"text"', "4", '"text"']
    assert table.column("huge").to_pylist() == [str(2**70)] * 3
    assert table.column("object").to_pylist() == ["{}"] * 3
    stats = json.loads((tmp_path / "out/00002_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (1, 1)
    assert stats["sha256"] == sha256_file(shards[2])


def test_the_same_samples_give_the_same_bytes(picture: Any, tmp_path: Path) -> None:
    for name in "ab":
        write_shards(samples(picture, 5), tmp_path / name, per_shard=3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / n).read_bytes() for n in files] == [
        (tmp_path / "b" / n).read_bytes() for n in files
    ]


def test_a_source_that_fails_leaves_no_half_shard(picture: Any, tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from samples(picture, 4)
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        write_shards(failing(), tmp_path, per_shard=3)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["00000.tar"]
    with pytest.raises(ConfigError, match="per_shard"):
        write_shards([], tmp_path, per_shard=0)


def test_members_of_any_name_are_written(picture: Any, tmp_path: Path) -> None:
    members = {"png": picture(1), "_mask.npy": b"1", "seg.png.txt": b"2", "x" * 120: b"3", "txt": b"words"}
    assert write_shard([(members, {"key": "000000000"})], tmp_path, "00000") == 1
    (path,) = tmp_path.glob("*.tar")
    with tarfile.open(path) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert found == {f"000000000.{extension}": data for extension, data in members.items()}
    assert check_shards([path]) == []


def test_no_samples_make_no_shard(tmp_path: Path) -> None:
    assert write_shard([], tmp_path, "00000") == 0
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 2_000_000), st.data())
def test_shards_sort_by_name_as_by_number(count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, count - 1))
    second = data.draw(st.integers(0, count - 1))
    assert (shard_name(first, count) < shard_name(second, count)) == (first < second)
