"""Packing a person's own pictures: nothing lost, nothing silent, and others can read the result."""

import json
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from clipkit.errors import ArtifactError, ConfigError, DataError, InputError, NotFoundError
from clipkit.images import decode_image
from clipkit_data.dataset import ShardDataset
from clipkit_data.shards.scan import check_shards
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.pack import pack


@pytest.fixture
def photos(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("sub/c.webp", "WEBP"), ("sub/d_e.gif", "GIF")):
        (folder / name).write_bytes(picture(ord(name[0]), kind=kind))
    (folder / "a.txt").write_text("a café\n", encoding="utf-8")
    return folder


def test_a_folder_becomes_sound_shards(photos: Path, tmp_path: Path) -> None:
    done: list[int] = []
    result = pack(photos, tmp_path / "out", per_shard=3, progress=done.append)
    assert result == {"samples": 4, "shards": 2, "faults": {}, "out": str(tmp_path / "out")}
    assert sum(done) == 4
    paths = resolve_shards(tmp_path / "out")
    assert [Path(path).name for path in paths] == ["00000.tar", "00001.tar"]
    assert check_shards(paths) == []
    dataset = ShardDataset(paths)
    found = {dataset[position].meta["path"]: dataset[position] for position in range(4)}
    assert {name: record.caption for name, record in found.items()} == {
        "a.jpg": "a café",
        "b.png": "b",
        "sub/c.webp": "c",
        "sub/d_e.gif": "d e",
    }
    for name in ("a.jpg", "b.png", "sub/c.webp"):
        assert found[name].image == (photos / name).read_bytes()
        assert (found[name].meta["width"], found[name].meta["height"]) == (24, 24)
    converted = Image.open(BytesIO(found["sub/d_e.gif"].image))
    assert converted.format == "PNG"
    assert converted.tobytes() == decode_image(photos / "sub/d_e.gif").tobytes()
    assert len({record.key for record in found.values()}) == 4
    assert not (tmp_path / "out/faults.jsonl").exists()


def test_webdataset_reads_them(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    path = tmp_path / "out/00000.tar"
    with path.open("rb") as file:
        files = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        samples = list(webdataset.tariterators.group_by_keys(files))
    assert [sample["txt"].decode() for sample in samples] == ["a café", "b", "c", "d e"]
    assert [json.loads(sample["json"])["caption"] for sample in samples] == ["a café", "b", "c", "d e"]


def test_other_columns_are_kept(photos: Path, tmp_path: Path) -> None:
    (photos / "t.csv").write_text("path,caption,stars,place,key\na.jpg,first,5,Köln,k1\nb.png,second,4,,k2\n")
    pack(photos / "t.csv", tmp_path / "out")
    dataset = ShardDataset(resolve_shards(tmp_path / "out"))
    assert [dataset[position].caption for position in (0, 1)] == ["first", "second"]
    assert dataset[0].meta.items() >= {"stars": 5, "place": "Köln", "caption": "first"}.items()
    assert dataset[0].meta["key"] == dataset.key(0)
    assert dataset[0].meta["source_key"] == "k1"


def test_every_kind_of_bad_row_is_counted_and_listed(
    photos: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    whole = picture(9, side=64)
    bad = {"cut.png": whole[: len(whole) // 2], "void.png": b"", "text.png": b"hello", "old.tif": b"II*\0"}
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    huge = BytesIO()
    Image.new("1", (9_000, 9_000)).save(huge, "PNG")
    (photos / "huge.png").write_bytes(huge.getvalue())
    names = ["a.jpg", *bad, "huge.png", "gone.png"]
    lines = [f"{name},words" for name in names] + ["b.png,", ",words", "b.png,a,b", "b.png,  "]
    (photos / "t.csv").write_text("path,caption\n" + "\n".join(lines) + "\n")
    result = pack(photos / "t.csv", tmp_path / "out")
    assert result["samples"] == 1
    assert result["faults"] == {
        "empty caption": 2,
        "picture format": 2,
        "missing file": 1,
        "missing path": 1,
        "picture empty": 1,
        "picture too large": 1,
        "picture undecodable": 1,
        "wrong number of columns": 1,
    }
    listed = [json.loads(line) for line in (tmp_path / "out/faults.jsonl").read_text().splitlines()]
    assert len(listed) == sum(result["faults"].values())
    assert {"key": "cut.png", "reason": "picture undecodable"}.items() <= listed[0].items()
    assert check_shards(resolve_shards(tmp_path / "out")) == []


def test_a_name_that_is_no_unicode_is_counted(photos: Path, tmp_path: Path) -> None:
    odd = os.path.join(os.fsencode(photos), b"caf\xe9.png")
    try:
        Path(os.fsdecode(odd)).write_bytes((photos / "b.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    result = pack(photos, tmp_path / "out")
    assert result["samples"] == 4
    assert result["faults"] == {"text is not Unicode": 1}
    assert "caf" in (tmp_path / "out/faults.jsonl").read_text(encoding="utf-8")


def test_what_cannot_be_packed(photos: Path, tmp_path: Path, shards: Path) -> None:
    (photos / "t.csv").write_text("path,caption\ngone.png,words\n")
    with pytest.raises(DataError, match="missing file ×1"):
        pack(photos / "t.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (photos / "t.csv").write_text("path,caption\n")
    with pytest.raises(DataError, match="no rows"):
        pack(photos / "t.csv", tmp_path / "out")
    with pytest.raises(InputError, match="shards already"):
        pack(shards, tmp_path / "out")
    with pytest.raises(NotFoundError):
        pack(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match="samples per shard"):
        pack(photos, tmp_path / "out", per_shard=0)
    with pytest.raises(ArtifactError, match="already exists"):
        pack(photos, photos / "sub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "shards"]


def test_processes_give_the_same_bytes_as_one(photos: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        pack(photos, tmp_path / f"out{jobs}", per_shard=1, jobs=jobs)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out1").iterdir()}
    assert len(list((tmp_path / "out1").glob("*.tar"))) == 4
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out2").iterdir()}


def test_the_folder_is_indexed(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", per_shard=3)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [(shard["name"], shard["samples"]) for shard in manifest["shards"]] == [
        ("00000.tar", 3),
        ("00001.tar", 1),
    ]
    assert (tmp_path / "out/00001_index.parquet").is_file()
    assert not list(tmp_path.rglob(".*"))


def test_rows_of_which_none_can_be_used_make_no_shard(
    photos: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    names = ["a.jpg", "b.png", "gone.png", "lost.png", "sub/c.webp"]
    (photos / "t.csv").write_text("path,caption\n" + "".join(f"{name},words\n" for name in names))
    result = pack(photos / "t.csv", tmp_path / "out", per_shard=2)
    assert (result["samples"], result["shards"], result["faults"]) == (3, 2, {"missing file": 2})
    assert [Path(path).name for path in resolve_shards(tmp_path / "out")] == ["00000.tar", "00002.tar"]
    listed = [json.loads(line) for line in (tmp_path / "out/faults.jsonl").read_text().splitlines()]
    assert [fault["position"] for fault in listed] == [2, 3]


def test_rows_and_faults_are_numbered_as_in_the_table(photos: Path, tmp_path: Path) -> None:
    paths = ["a.jpg", None, "gone.png", "b.png", "lost.png", None]
    rows = pa.table({"path": paths, "caption": ["words"] * 6})
    pq.write_table(rows, photos / "t.parquet")
    result = pack(photos / "t.parquet", tmp_path / "out", per_shard=2, jobs=1)
    assert result["faults"] == {"missing file": 2, "missing path": 2}
    listed = [json.loads(line) for line in (tmp_path / "out/faults.jsonl").read_text().splitlines()]
    assert [(fault["position"], fault["key"]) for fault in listed] == [
        (1, ""),
        (2, "gone.png"),
        (4, "lost.png"),
        (5, ""),
    ]
    assert [Path(path).name for path in resolve_shards(tmp_path / "out")] == ["00000.tar", "00001.tar"]


def test_a_stray_quote_takes_no_rows_with_it(photos: Path, tmp_path: Path) -> None:
    lines = [f"b.png\tcaption {number}" for number in range(50)]
    lines[10] = 'b.png\t"Just a quote at the start, 5 feet tall'
    (photos / "t.tsv").write_text("path\tcaption\n" + "\n".join(lines) + "\n")
    result = pack(photos / "t.tsv", tmp_path / "out")
    assert (result["samples"], result["faults"]) == (50, {})
    lines = [line.replace("\t", ",", 1) for line in lines]
    (photos / "t.csv").write_text("path,caption\n" + "\n".join(lines) + "\n")
    result = pack(photos / "t.csv", tmp_path / "out2")
    assert (result["samples"], result["faults"]) == (49, {"invalid csv": 1})
    (fault,) = [json.loads(line) for line in (tmp_path / "out2/faults.jsonl").read_text().splitlines()]
    assert fault["position"] == 10
    assert fault["detail"].startswith("line 12: ")


def test_only_folders_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/2024").symlink_to(tmp_path / "not mounted")
    with pytest.raises(DataError, match=r"broken link ×1; the first: .*photos/2024"):
        pack(tmp_path / "photos", tmp_path / "out")
