"""Statistics of shards: checked against what was written into them."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipkit.cli import main
from clipkit.errors import InputError, NotFoundError
from clipkit_data.tools.plots import histograms
from clipkit_data.tools.stats import QUANTITIES, shard_statistics


def encoded(size: tuple[int, int], kind: str, colour: str = "red", turned: bool = False) -> bytes:
    buffer, options = BytesIO(), {}
    if turned:
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    Image.new("RGB", size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def mixed(write_shard: Callable[..., Path], tmp_path: Path) -> Path:
    """Two shards: six samples in three formats, one turned by EXIF, duplicates, an unreadable header."""
    first: list[dict[str, Any]] = [
        {"__key__": "0", "jpg": encoded((40, 20), "JPEG"), "txt": b"a red box"},
        {"__key__": "1", "jpg": encoded((40, 20), "JPEG"), "txt": b"a red box"},
        {"__key__": "2", "jpg": encoded((60, 20), "JPEG", turned=True), "txt": "一只猫".encode()},
        {"__key__": "3", "jpg": b"no picture", "txt": b"words"},
    ]
    second: list[dict[str, Any]] = [
        {"__key__": "0", "png": encoded((10, 10), "PNG"), "txt": b""},
        {"__key__": "1", "webp": encoded((30, 20), "WEBP"), "txt": b"a red box"},
        {"__key__": "2", "txt": b"no picture at all"},
    ]
    write_shard("mixed/00000.tar", first)
    write_shard("mixed/00001.tar", second)
    return tmp_path / "mixed"


def test_everything_is_counted(mixed: Path) -> None:
    seen: list[int] = []
    found = shard_statistics(mixed, jobs=1, progress=seen.append)
    summary = found.summary
    assert sum(seen) == summary["samples"] == 6
    assert summary["shards"] == 2
    assert summary["bytes"] == sum(path.stat().st_size for path in mixed.glob("*.tar"))
    assert summary["formats"] == {"JPEG": 3, "PNG": 1, "WEBP": 1}
    assert found.values["width"].tolist() == [40, 40, 20, 10, 30]
    assert found.values["height"].tolist() == [20, 20, 60, 10, 20]
    assert found.values["aspect"].tolist() == [2, 2, 3, 1, 1.5]
    assert found.values["words"].tolist() == [3, 3, 1, 3]
    assert found.values["characters"].tolist() == [9, 9, 3, 9]
    assert summary["empty_captions"] == 1
    assert summary["duplicate_captions"] == {
        "samples": 2,
        "most_frequent": [{"caption": "a red box", "times": 3}],
    }
    assert summary["duplicate_pictures"] == {"samples": 1, "most_frequent": [{"key": "0", "times": 2}]}
    assert summary["faults"] == {"missing picture": 1, "picture format": 1}
    quantiles = summary["per_sample"]["width"]
    assert (quantiles["min"], quantiles["median"], quantiles["max"], quantiles["mean"]) == (10, 30, 40, 28)
    json.dumps(summary, allow_nan=False)


def test_processes_count_the_same(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    write_shard("many/00000.tar", 600)  # more than one block
    one, two = (shard_statistics(tmp_path / "many", jobs=jobs) for jobs in (1, 2))
    assert one.summary == two.summary
    assert one.summary["samples"] == 600
    for name in QUANTITIES:
        assert np.array_equal(one.values[name], two.values[name])


def test_shards_without_captions(write_shard: Callable[..., Path], tmp_path: Path) -> None:
    write_shard("bare/00000.tar", [{"__key__": "0", "jpg": encoded((40, 20), "JPEG")}])
    found = shard_statistics(tmp_path / "bare")
    assert found.summary["empty_captions"] == 1
    assert found.summary["per_sample"]["words"] is None
    histograms(found.values, tmp_path / "plot.png")
    with pytest.raises(NotFoundError):
        shard_statistics(tmp_path / "nothing")


def test_shards_without_one_good_picture(write_shard: Callable[..., Path], tmp_path: Path) -> None:
    write_shard("bad/00000.tar", [{"__key__": "0", "jpg": b"no picture", "txt": b"words"}])
    summary = shard_statistics(tmp_path / "bad").summary
    assert summary["faults"] == {"picture format": 1}
    assert summary["formats"] == {}
    assert set(summary["per_sample"].values()) == {None}
    assert summary["duplicate_pictures"]["samples"] == 0
    assert main(["shards", "stats", str(tmp_path / "bad")]) == 0


def test_texts_videos_and_graphs_are_no_faults(write_shard: Callable[..., Path], tmp_path: Path) -> None:
    red, blue = encoded((40, 20), "PNG"), encoded((40, 20), "PNG", "blue")
    mixed: list[dict[str, Any]] = [
        {"__key__": "0", "graph.npz": b"graph", "txt": b"a graph"},
        {"__key__": "1", "mp4": b"a video", "txt": b"a video"},
        {"__key__": "2", "mp4": b"a video", "txt": b"a video again"},
        {"__key__": "3", "0.png": red, "1.png": blue, "txt": b"a clip"},
        {"__key__": "4", "0.png": red, "1.png": red, "txt": b"another clip"},
        {"__key__": "5", "0.png": red, "1.png": b"no picture", "txt": b"a broken clip"},
        {"__key__": "6", "0.png": encoded((30, 30), "PNG"), "txt": b"a clip of one frame"},
    ]
    write_shard("mixed/00000.tar", mixed)
    write_shard("mixed/00001.tar", [{"__key__": str(n), "txt": b"the same text"} for n in range(3)])
    found = shard_statistics(tmp_path / "mixed")
    summary = found.summary
    assert summary["samples"] == 10
    assert summary["faults"] == {"picture format": 1}
    assert summary["formats"] == {"PNG": 3}
    assert found.values["width"].tolist() == [40, 40, 30]
    assert found.values["bytes"].tolist() == [5, 7, 7, len(red + blue), 2 * len(red), len(mixed[6]["0.png"])]
    assert len(found.values["words"]) == 9
    assert summary["duplicate_pictures"] == {"samples": 1, "most_frequent": [{"key": "1", "times": 2}]}
    assert summary["duplicate_captions"]["samples"] == 2
    json.dumps(summary, allow_nan=False)


def test_shards_of_texts_alone(
    write_shard: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard("texts/00000.tar", [{"__key__": str(n), "txt": f"text {n}".encode()} for n in range(3)])
    assert main(["shards", "stats", str(tmp_path / "texts"), "--plot", str(tmp_path / "plot.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["words", "2", "2", "2", "2", "2", "2"] in lines
    assert not any(line[:1] in (["width"], ["fault:"]) for line in lines)


def test_the_bars_are_as_high_as_the_counts(tmp_path: Path) -> None:
    values = np.array([1.0] * 10 + [2.0] * 5)
    histograms({"words": values}, tmp_path / "plot.png", title="two bars")
    blue = np.all(np.asarray(Image.open(tmp_path / "plot.png")) == (0x4C, 0x78, 0xA8), axis=-1)
    heights = blue.sum(axis=0)
    left, right = heights[heights.size // 4], heights[heights.size * 3 // 4]
    assert left > 100
    assert abs(left - 2 * right) <= 2
    for suffix in (".txt", ".pdf", ".tiff", ".gif", ""):
        with pytest.raises(InputError, match=r"name it \.png"):
            histograms({"words": values}, tmp_path / f"plot{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
