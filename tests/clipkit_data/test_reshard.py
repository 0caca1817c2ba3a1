"""Resharding: every member of every sound sample once, byte for byte, in shards of the size asked for."""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from clipkit.errors import ConfigError, DataError, NotFoundError
from clipkit_data.dataset import ShardDataset
from clipkit_data.shards.scan import check_shards
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.indexing import index_shards
from clipkit_data.tools.reshard import reshard

Sample = dict[str, bytes]


def samples_of(folder: Path) -> list[tuple[str, Sample]]:
    """Key and members of every sample, read by Python's own tarfile."""
    found: dict[str, Sample] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert extension not in found.get(key, {}), member.name
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return list(found.items())


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    per_shard=st.integers(1, 8),
    seed=st.none() | st.integers(0, 3),
)
def test_every_sample_is_copied_once(sizes: list[int], per_shard: int, seed: int | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, expected = Path(name), []
        (root / "in").mkdir()
        for shard, size in enumerate(sizes):
            with (root / f"in/{shard:05d}.tar").open("wb") as file, TarWriter(file, encoder=False) as writer:
                for place in range(size):
                    members = {"jpg": os.urandom(1 + place * 300), "seg.npy": b"%d %d" % (shard, place)}
                    writer.write({"__key__": f"{place}", **members})
                    expected.append(members)
        result = reshard(
            root / "in", root / "out", per_shard=per_shard, shuffle=seed is not None, seed=seed or 0, jobs=1
        )
        found = samples_of(root / "out")
        assert result["samples"] == len(found) == len(expected)
        copied = [members for _, members in found]
        if seed is None:
            assert copied == expected
        else:
            assert sorted(copied, key=str) == sorted(expected, key=str)
        lengths = ShardDataset(resolve_shards(root / "out")).sizes.tolist()
        assert lengths == [per_shard] * (len(expected) // per_shard) + (
            [len(expected) % per_shard] if len(expected) % per_shard else []
        )
        assert result["shards"] == len(lengths)


def test_the_order_depends_on_the_seed_alone(shards: Path, tmp_path: Path) -> None:
    for name, seed, jobs in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        reshard(shards, tmp_path / name, per_shard=4, shuffle=True, seed=seed, jobs=jobs)
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]
    assert samples_of(tmp_path / "a") != samples_of(shards)


def test_the_table_says_where_a_sample_came_from(shards: Path, tmp_path: Path) -> None:
    reshard(shards, tmp_path / "out", per_shard=5)
    table = pq.read_table(tmp_path / "out/00001.parquet").to_pylist()
    assert [row["key"] for row in table] == [f"00001{place:04d}" for place in range(5)]
    assert [(row["source_shard"], row["source_key"]) for row in table[1:3]] == [
        ("00000.tar", "000000006"),
        ("00001.tar", "000000007"),
    ]
    assert table[0]["caption"] == "caption 5"
    assert table[0]["name"] == "name 5"
    paths = [Path(path) for path in resolve_shards(tmp_path / "out")]
    assert check_shards(paths) == []
    stats = json.loads((tmp_path / "out/00002_stats.json").read_text())
    assert stats["successes"] == 3
    assert (tmp_path / "out/manifest.json").is_file()


def test_a_caption_that_cannot_be_read_is_copied_as_it_is(
    write_shard: Callable[..., Path], tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    sample = {"__key__": "0", "png": picture(0), "txt": b"\xff\xfe", "json": b"no json"}
    write_shard("in/00000.tar", [sample])
    reshard(tmp_path / "in", tmp_path / "out")
    ((_, members),) = samples_of(tmp_path / "out")
    assert members == {name: data for name, data in sample.items() if name != "__key__"}


def test_a_member_without_an_extension_cannot_be_copied(
    write_shard: Callable[..., Path], tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    path = write_shard("in/00000.tar", 3)
    with tarfile.open(path, "a") as tar:
        for name, data in (("9.png", picture(9)), ("9.", b"?"), ("9.txt", b"words"), ("9.json", b"{}")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    result = reshard(tmp_path / "in", tmp_path / "out")
    assert (result["samples"], result["faults"]) == (3, {"member name": 1})


def test_damage_is_left_out_and_listed(shards: Path, tmp_path: Path) -> None:
    index_shards(shards)
    path = shards / "00001.tar"
    time = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    dataset = ShardDataset([path])
    data[data.index(dataset[2].image) + 30] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time, time))  # as a disk that decays does
    result = reshard(shards, tmp_path / "out", per_shard=10)
    assert (result["samples"], result["faults"]) == (12, {"CRC": 1})
    (fault,) = [json.loads(line) for line in (tmp_path / "out/faults.jsonl").read_text().splitlines()]
    assert (fault["shard"], fault["sample"]) == ("00001.tar", "000000009")
    keys = [row["source_key"] for row in pq.read_table(tmp_path / "out/00000.parquet").to_pylist()]
    assert "000000009" not in keys
    path.write_bytes((shards / "00000.tar").read_bytes()[: 512 * 7])
    assert reshard(path, tmp_path / "cut")["faults"]


def test_a_folder_behind_a_link(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert reshard(shards, tmp_path / "link")["out"] == str(tmp_path / "link")
    assert len(samples_of(tmp_path / "real")) == 13


def test_what_cannot_be_resharded(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        reshard(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match="samples per shard"):
        reshard(shards, tmp_path / "out", per_shard=0)
    with pytest.raises(ConfigError, match="seed"):
        reshard(shards, tmp_path / "out", shuffle=True, seed=-1)
    (tmp_path / "void.tar").write_bytes(bytes(10240))
    with pytest.raises(DataError, match="no sound sample"):
        reshard(tmp_path / "void.tar", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
