"""What a SOURCE can be, and what becomes of rows that are wrong."""

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit_data.dataset import ShardDataset
from clipkit_data.loose import caption_from_name
from clipkit_data.records import Record, SampleFault
from clipkit_data.sources import is_shards, iter_pairs, open_source, resolve_shards
from tests.clipkit_data.flaky_server import flaky_server


@pytest.fixture
def photos(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "red_fire-truck.png").write_bytes(picture(0))
    (folder / "b.JPG").write_bytes(picture(1, kind="JPEG"))
    (folder / "b.txt").write_text("  a caption of its own\n")
    (folder / "sub" / "c.webp").write_bytes(picture(2, kind="WEBP"))
    (folder / "sub" / "c.json").write_text('{"place": "here"}')
    (folder / "notes.md").write_text("no picture")
    (folder / ".hidden" / "d.png").write_bytes(picture(3))
    return folder


def records(source: Path) -> list[Record]:
    found = list(iter_pairs(source))
    assert all(isinstance(item, Record) for item in found)
    return [item for item in found if isinstance(item, Record)]


def faults(source: Path) -> list[tuple[str, str]]:
    return [(item.key, item.reason) for item in iter_pairs(source) if isinstance(item, SampleFault)]


def test_shards_by_folder_file_pattern_and_list(shards: Path) -> None:
    both = [shards / "00000.tar", shards / "00001.tar"]
    assert resolve_shards(shards) == both
    assert resolve_shards(both[1]) == both[1:]
    assert resolve_shards(f"{shards}/{{00000..00001}}.tar") == both
    assert resolve_shards(f"{shards}/*.tar") == both
    assert resolve_shards([both[1], str(both[0])]) == both[::-1]
    assert is_shards(shards)
    assert isinstance(open_source(f"{shards}/{{00000..00001}}.tar"), ShardDataset)


def test_unknown_shards(shards: Path, tmp_path: Path) -> None:
    for spec in (tmp_path / "no", f"{shards}/{{00000..00002}}.tar", f"{tmp_path}/*.tar", tmp_path):
        with pytest.raises(NotFoundError):
            resolve_shards(spec)
    with pytest.raises(NotFoundError, match="no sample named 'birds'"):
        resolve_shards("sample:birds")


def test_shards_elsewhere_stay_urls(shards: Path) -> None:
    names = [f"https://host/data/0000{number}.tar" for number in range(3)]
    assert resolve_shards("https://host/data/{00000..00002}.tar") == names
    assert resolve_shards(names[1]) == names[1:2]
    assert resolve_shards(f"{names[0]}?sig=a/b") == [f"{names[0]}?sig=a/b"]
    assert resolve_shards([shards / "00001.tar", names[2]]) == [shards / "00001.tar", names[2]]
    assert resolve_shards(f"file://{shards}") == [shards / "00000.tar", shards / "00001.tar"]
    assert resolve_shards(f"file://{shards}/0000{{0,1}}.tar") == resolve_shards(shards)
    assert all(is_shards(spec) for spec in (names[0], "s3://bucket/folder", "https://host/{0..9}.tar"))
    with pytest.raises(InputError, match="braces do not match"):
        resolve_shards("https://host/{0..9.tar")


def test_folders_elsewhere_are_listed(shards: Path) -> None:
    files, root = fsspec.filesystem("memory"), f"memory://{uuid4().hex}"
    for path in shards.iterdir():
        files.put_file(str(path), f"{root}/{path.name}")
    both = [f"{root}/00000.tar", f"{root}/00001.tar"]
    assert resolve_shards(root) == resolve_shards(f"{root}/*.tar") == both
    assert resolve_shards(f"{root}/0000[!0]*.tar") == both[1:]
    with pytest.raises(NotFoundError, match="no shards in memory://"):
        resolve_shards(f"{root}/nothing")


def test_a_folder_on_a_web_server_needs_its_manifest() -> None:
    with flaky_server() as server:
        with pytest.raises(InputError, match="cannot list"):
            resolve_shards(f"{server.url}/data/")
        names = [{"name": "00000.tar"}, {"name": "00001.tar"}]
        server.put("data/manifest.json", json.dumps({"format": 1, "shards": names}).encode())
        both = [f"{server.url}/data/00000.tar", f"{server.url}/data/00001.tar"]
        assert resolve_shards(f"{server.url}/data/") == both


@pytest.mark.parametrize("spec", ["pipe:cat {0..9}.tar", "stream:https://host/{0..9}.tar"])
def test_a_stream_is_no_source_with_an_order(spec: str) -> None:
    assert is_shards(spec)
    with pytest.raises(InputError, match="can only be streamed"):
        open_source(spec)


def test_samples_that_ship() -> None:
    both = resolve_shards("sample:emoji/{train,heldout}")
    assert both == resolve_shards("sample:emoji/train") + resolve_shards("sample:emoji/heldout")
    assert sorted(both) == sorted(resolve_shards("sample:emoji"))
    dataset = open_source("sample:emoji/heldout")
    assert isinstance(dataset, ShardDataset)
    assert not dataset.faults
    assert {dataset[position].meta["split"] for position in range(len(dataset))} == {"heldout"}


def test_folder_takes_captions_beside_pictures_or_from_names(photos: Path) -> None:
    found = {record.key: record for record in records(photos)}
    assert {key: record.caption for key, record in found.items()} == {
        "b.JPG": "a caption of its own",
        "red_fire-truck.png": "red fire truck",
        "sub/c.webp": "c",
    }
    assert found["sub/c.webp"].meta == {"place": "here"}
    assert found["b.JPG"].image == (photos / "b.JPG").read_bytes()


@pytest.mark.parametrize(
    ("name", "caption"),
    [("red_fire-truck.jpg", "red fire truck"), ("a__b--c.png", "a b c"), ("v1.2_cat.png", "v1.2 cat")],
)
def test_caption_from_name(name: str, caption: str) -> None:
    assert caption_from_name(Path(name)) == caption


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        cells = [list(rows[0]), *[[str(value) for value in row.values()] for row in rows]]
        path.write_text("".join(mark.join(f'"{cell}"' for cell in row) + "\n" for row in cells))
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(photos: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [
        {"path": "b.JPG", "caption": "one, 红苹果", "stars": 3},
        {"path": "sub/c.webp", "caption": "12", "stars": 4},
    ]
    found = records(write_table(photos / f"table.{suffix}", rows))
    assert [(record.key, record.caption) for record in found] == [
        ("b.JPG", "one, 红苹果"),
        ("sub/c.webp", "12"),
    ]
    assert [record.meta["stars"] for record in found] == [3, 4]
    assert found[1].image == (photos / "sub" / "c.webp").read_bytes()


def test_csv_with_wrong_rows(photos: Path) -> None:
    path = photos / "table.csv"
    path.write_bytes(
        b"\xef\xbb\xbfpath,caption,note\n"
        b"b.JPG,fine,x\n"
        b"b.JPG,too,many,cells\n"
        b"missing.png,gone,x\n"
        b",no path,x\n"
        b"b.JPG,n\xe9,x\n"
        b'b.JPG,"two\nlines",x\n'
        b"sub,a folder,x\n"
    )
    found = [item.caption for item in iter_pairs(path) if isinstance(item, Record)]
    assert found == ["fine", "two\nlines"]
    assert sorted(faults(path)) == [
        ("", "missing path"),
        ("", "wrong number of columns"),
        ("b.JPG", "caption is not UTF-8"),
        ("missing.png", "missing file"),
        ("sub", "missing file"),
    ]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_position_is_a_row_of_the_table(photos: Path, suffix: str) -> None:
    names = ["b.JPG", "", "gone.png", "sub/c.webp", "lost.png"]
    rows: list[dict[str, object]] = [{"path": name, "caption": "words"} for name in names]
    items = list(iter_pairs(write_table(photos / f"t.{suffix}", rows)))
    assert [item.id[1] if isinstance(item, Record) else item.position for item in items] == [0, 1, 2, 3, 4]
    assert [item.reason for item in items if isinstance(item, SampleFault)] == [
        "missing path",
        "missing file",
        "missing file",
    ]


def test_the_fingerprint_follows_what_lies_beside_a_picture(photos: Path) -> None:
    table = write_table(photos / "t.csv", [{"path": "b.JPG", "caption": "words"}])

    def prints() -> tuple[str, str]:
        return open_source(photos).fingerprint(), open_source(table).fingerprint()

    folder, rows = prints()
    assert prints() == (folder, rows)
    os.utime(photos / "b.JPG", ns=(1, 1))
    assert all(old != new for old, new in zip((folder, rows), prints(), strict=True))
    folder, rows = prints()
    for name, text in (("b.txt", "another"), ("red_fire-truck.txt", "new"), ("sub/c.json", '{"place": "x"}')):
        (photos / name).write_text(text)
        assert prints()[0] != folder
        folder = prints()[0]
    os.utime(photos / "b.txt", ns=(1, 1))
    assert prints()[0] != folder
    assert prints()[1] == rows, "what lies beside a picture says nothing of a table's row"


def test_folders_behind_links_are_read_once(
    photos: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    album = tmp_path / "elsewhere/album"
    album.mkdir(parents=True)
    (album / "e.png").write_bytes(picture(4))
    (album / "back").symlink_to(photos)
    (photos / "album").symlink_to(album)
    (photos / "album again").symlink_to(album)
    (photos / "a link to sub").symlink_to("sub")
    (photos / "sub/loop").symlink_to("..")
    (photos / ".away").symlink_to(album)
    (photos / "own name.png").symlink_to("b.JPG")
    assert [record.key for record in records(photos)] == [
        "album/e.png",
        "b.JPG",
        "own name.png",
        "red_fire-truck.png",
        "sub/c.webp",
    ]
    (photos / "both").symlink_to(album.parent)
    assert "album/e.png" in [record.key for record in records(photos)]


def test_a_folder_that_cannot_be_read_is_a_fault(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "gone").symlink_to("nowhere")
    (photos / "circle").symlink_to("circle")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert faults(photos) == [
        ("circle", "broken link"),
        ("gone", "broken link"),
        ("sub", "unreadable folder"),
    ]
    (fault,) = [
        item for item in iter_pairs(photos) if isinstance(item, SampleFault) and item.reason[0] == "u"
    ]
    assert fault.detail == f"{photos / 'sub'}: Permission denied"


def test_jsonl_with_wrong_rows(photos: Path) -> None:
    path = photos / "table.jsonl"
    path.write_text('{"path": "b.JPG", "caption": "fine"}\n{"path": \n[1]\n{"caption": "x"}\n')
    assert faults(path) == [("", "invalid json"), ("", "invalid json"), ("", "missing path")]


def test_odd_values_become_json(photos: Path) -> None:

    rows: list[dict[str, object]] = [
        {
            "path": "b.JPG",
            "caption": None,
            "day": datetime.date(2020, 1, 2),
            "raw": b"\xff",
            "x": float("nan"),
        }
    ]
    path = write_table(photos / "t.parquet", rows)
    record = records(path)[0]
    assert record.caption == ""
    assert json.loads(json.dumps(record.meta, allow_nan=False)) == {
        "day": "2020-01-02",
        "raw": "\ufffd",
        "x": None,
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_columns_that_are_missing(photos: Path, suffix: str) -> None:
    path = write_table(photos / f"table.{suffix}", [{"filepath": "b.JPG", "caption": "words"}])
    with pytest.raises(InputError, match="no column 'path'") as caught:
        open_source(path)
    assert "filepath" in str(caught.value)
    path = write_table(photos / f"table.{suffix}", [{"path": "b.JPG"}])
    assert open_source(path)[0].caption is None
    with pytest.raises(InputError, match="no column 'caption'"):
        open_source(path, captions=True)


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    (tmp_path / "x.parquet").write_text("hello")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(NotFoundError, match="no such file"):
        open_source(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="no pictures"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="is no SOURCE"):
        open_source(tmp_path / "x.txt")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(tmp_path / "x.parquet")
    with pytest.raises(InputError, match="columns found: none"):
        open_source(tmp_path / "x.csv")
