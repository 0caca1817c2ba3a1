"""Filtering shards: what is kept is what passes, byte for byte; everything else is listed with its reason."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.embedder import Embedder
from clipkit.errors import ConfigError, DataError, InputError, MismatchError, NotFoundError
from clipkit.models import ModelConfig, build_model, save_model
from clipkit_data.dataset import ShardDataset
from clipkit_data.sources import resolve_shards
from clipkit_data.tools import similarity
from clipkit_data.tools.filter import Criteria, filter_shards
from clipkit_data.tools.reshard import read_members
from clipkit_data.tools.similarity import near_duplicates

CONFIG = ModelConfig.model_validate(
    {
        "image": {"name": "cnn", "widths": (8,), "depths": (1,), "groups": 4},
        "text": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        "dim": 8,
        "preprocess": {"size": 16},
        "tokenizer": {"name": "clip", "context_length": 16},
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(build_model(CONFIG, seed=0), folder)
    return str(folder)


@pytest.fixture
def mixed(write_shard: Callable[..., Path], tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Three shards: 7 and 6 samples, and copies: equal bytes, equal pixels, a broken picture, no caption."""
    write_shard("mixed/00000.tar", 7)
    write_shard("mixed/00001.tar", 6, start=7)
    again = BytesIO()
    Image.open(BytesIO(picture(4))).save(again, "PNG", compress_level=0)
    copies = [
        {"__key__": "same", "png": picture(2), "txt": b"caption 2 again", "json": b"{}"},
        {"__key__": "pixels", "png": again.getvalue(), "txt": b"caption 4 again", "json": b"{}"},
        {"__key__": "broken", "png": picture(30)[:200], "txt": b"broken", "json": b"{}"},
        {"__key__": "silent", "png": picture(31), "txt": b"", "json": b"{}"},
    ]
    write_shard("mixed/00002.tar", copies)
    return tmp_path / "mixed"


def members(folder: Path) -> list[dict[str, bytes]]:
    dataset = ShardDataset(resolve_shards(folder))
    return [read_members(dataset, position) for position in range(len(dataset))]


def dropped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_condition_keeps_what_it_is_true_of(mixed: Path, tmp_path: Path, jobs: int) -> None:
    criteria = Criteria(where="key between '000000003' and '000000008' and width = 24 and name is not null")
    result = filter_shards(mixed, tmp_path / "out", criteria, per_shard=4, jobs=jobs)
    assert result == {
        "samples": 17,
        "kept": 6,
        "dropped": {"where": 11},
        "shards": 2,
        "faults": {},
        "out": str(tmp_path / "out"),
    }
    assert members(tmp_path / "out") == members(mixed)[3:9]
    lines = dropped(tmp_path / "out")
    assert [line["position"] for line in lines] == [0, 1, 2, *range(9, 17)]
    assert lines[-1] == {"position": 16, "shard": "00002.tar", "key": "silent", "reason": "where"}
    table = pq.read_table(tmp_path / "out/00001.parquet").to_pylist()
    assert [row["source_key"] for row in table] == ["000000007", "000000008"]


def test_equal_bytes_are_kept_once(mixed: Path, tmp_path: Path) -> None:
    result = filter_shards(mixed, tmp_path / "out", Criteria(duplicates=True))
    assert result["dropped"] == {"duplicate": 1}
    first = {"position": 2, "shard": "00000.tar", "key": "000000002"}
    assert dropped(tmp_path / "out") == [
        {"position": 13, "shard": "00002.tar", "key": "same", "reason": "duplicate", "of": first}
    ]
    everything = members(mixed)
    assert members(tmp_path / "out") == everything[:13] + everything[14:]


def test_a_duplicate_of_what_is_dropped_is_kept(mixed: Path, tmp_path: Path) -> None:
    criteria = Criteria(where="key <> '000000002'", duplicates=True)
    result = filter_shards(mixed, None, criteria)
    assert result == {"samples": 17, "kept": 16, "dropped": {"where": 1}}
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]


def test_clips_are_compared_by_all_their_frames(
    write_shard: Callable[..., Path], tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    one, two = picture(1), picture(2)
    clips = [(one, two), (one, one), (one, two), (one,), (one, two, two), (two, one)]
    samples = [
        {"__key__": str(number), **{f"{place}.png": frame for place, frame in enumerate(frames)}}
        for number, frames in enumerate(clips)
    ]
    write_shard("clips/00000.tar", samples)
    result = filter_shards(tmp_path / "clips", tmp_path / "out", Criteria(duplicates=True))
    assert result["dropped"] == {"duplicate": 1}
    assert [line["key"] for line in dropped(tmp_path / "out")] == ["2"]
    large = Criteria(where=f"bytes = {len(one) + 2 * len(two)} and width = 24")
    assert filter_shards(tmp_path / "clips", None, large)["kept"] == 1


def test_what_is_no_picture_is_judged_as_well(
    write_shard: Callable[..., Path], tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    write_shard("texts/00000.tar", [{"__key__": str(n), "txt": f"text {n % 3}".encode()} for n in range(4)])
    texts = filter_shards(tmp_path / "texts", None, Criteria(where="words > 0", duplicates=True))
    assert texts == {"samples": 4, "kept": 3, "dropped": {"duplicate": 1}}
    others = [
        {"__key__": "0", "mp4": b"video", "txt": b"a video"},
        {"__key__": "1", "graph.npz": b"graph", "txt": b"a graph"},
        {"__key__": "2", "graph.npz": b"graph", "txt": b"that graph"},
        {"__key__": "3", "png": picture(3), "txt": b"a picture"},
        {"__key__": "4", "png": b"video", "txt": b"no picture"},
        {"__key__": "5", "png": b"", "txt": b"nothing at all"},
    ]
    write_shard("others/00000.tar", others)
    found = filter_shards(tmp_path / "others", None, Criteria(where="width is null", duplicates=True))
    faults = {"picture format": 1, "picture empty": 1}
    assert found == {"samples": 6, "kept": 2, "dropped": {"duplicate": 1, "where": 1} | faults}


def test_a_fault_may_hold_any_text(
    write_shard: Callable[..., Path], tmp_path: Path, picture: Callable[..., bytes], model: str
) -> None:
    key = "odd\u2028key"
    samples = [
        {"__key__": "0", "png": picture(0), "txt": b"a picture"},
        {"__key__": key, "png": picture(1)[:200], "txt": b"broken"},
    ]
    write_shard("odd/00000.tar", samples)
    criteria = Criteria(min_score=-1, model=model)
    assert filter_shards(tmp_path / "odd", tmp_path / "out", criteria)["kept"] == 1
    (line,) = dropped(tmp_path / "out")
    assert (line["key"], line["reason"]) == (key, "picture undecodable")


def test_scores_are_cosines_of_picture_and_caption(mixed: Path, tmp_path: Path, model: str) -> None:
    dataset = ShardDataset(resolve_shards(mixed))
    embedder = Embedder(model, device="cpu")
    whole = [position for position in range(17) if position not in (15, 16)]
    images = embedder.images([dataset[position].image for position in whole])
    texts = embedder.texts([dataset[position].caption or "" for position in whole])
    cosines = (images * texts).sum(axis=1)
    order = np.sort(cosines)
    least = float(order[7] + order[8]) / 2
    result = filter_shards(mixed, tmp_path / "out", Criteria(min_score=least, model=model))
    assert result["dropped"] == {"score": 8, "empty caption": 1, "picture undecodable": 1}
    everything = members(mixed)
    expected = [everything[place] for place, cosine in zip(whole, cosines, strict=True) if cosine >= least]
    assert members(tmp_path / "out") == expected
    by_position = dict(zip(whole, cosines, strict=True))
    for line in dropped(tmp_path / "out"):
        if line["reason"] == "score":
            assert line["score"] == pytest.approx(by_position[line["position"]], abs=2e-3)


def test_equal_pixels_are_near_duplicates(mixed: Path, tmp_path: Path, model: str) -> None:
    criteria = Criteria(where="key not in ('broken')", near_duplicates=0.999999, model=model)
    result = filter_shards(mixed, tmp_path / "out", criteria)
    near = {line["key"]: line for line in dropped(tmp_path / "out") if line["reason"] == "near duplicate"}
    assert {"same", "pixels"} <= set(near)
    assert (near["same"]["of"]["key"], near["pixels"]["of"]["key"]) == ("000000002", "000000004")
    assert near["same"]["cosine"] == 1
    assert result["kept"] == 16 - len(near)


def brute_force(images_ND: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for row in range(len(images_ND)):
        if not kept or (images_ND[kept] @ images_ND[row]).max() < threshold:
            kept.append(row)
    return kept


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 300])
def test_near_duplicates_are_those_of_brute_force(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_BLOCK", 8)
    vectors = np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    of_N, cosine_N = near_duplicates(vectors, 0.9)
    kept = brute_force(vectors, 0.9)
    assert np.flatnonzero(of_N < 0).tolist() == kept
    for row in np.flatnonzero(of_N >= 0):
        before = [place for place in kept if place < row]
        assert vectors[row] @ vectors[of_N[row]] == pytest.approx((vectors[before] @ vectors[row]).max())
        assert cosine_N[row] == pytest.approx(vectors[row] @ vectors[of_N[row]])


def test_an_interrupted_filter_does_not_ask_the_model_again(mixed: Path, tmp_path: Path, model: str) -> None:
    stages: list[str] = []

    class Bar:
        def __init__(self, name: str, total: float | None) -> None:
            stages.append(name)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, amount: float = 1) -> None:
            if stages[-2:] == ["comparing", "writing"] and amount:
                raise KeyboardInterrupt

    criteria = Criteria(where="words > 0", near_duplicates=0.999999, model=model)
    with pytest.raises(KeyboardInterrupt):
        filter_shards(mixed, tmp_path / "out", criteria, jobs=1, bars=Bar)
    with pytest.raises(MismatchError, match="where"):
        filter_shards(mixed, tmp_path / "out", Criteria(where="words > 1"))
    result = filter_shards(mixed, tmp_path / "out", criteria, jobs=1, bars=Bar)
    assert stages == ["reading", "embedding", "comparing", "writing", "writing"]
    assert filter_shards(mixed, tmp_path / "again", criteria) == result | {"out": str(tmp_path / "again")}
    files = [{path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("out", "again")]
    assert files[0] == files[1]
    assert not list((tmp_path / "out").rglob("*embeddings*"))


def test_criteria_that_make_no_sense(mixed: Path, tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    for criteria, words in (
        (Criteria(), "nothing to filter by"),
        (Criteria(min_score=0.2), "need a model"),
        (Criteria(near_duplicates=0.9), "need a model"),
        (Criteria(duplicates=True, model="m"), "not used"),
        (Criteria(min_score=25, model="m"), "between -1 and 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            filter_shards(mixed, out, criteria)
    with pytest.raises(InputError, match="field 'hight'"):
        filter_shards(mixed, out, Criteria(where="hight > 3"))
    with pytest.raises(NotFoundError):
        filter_shards(mixed, out, Criteria(min_score=0.2, model=str(tmp_path / "gone")))
    with pytest.raises(DataError, match=r"no sample of .* is left: where ×17"):
        filter_shards(mixed, out, Criteria(where="width > 5000"))
    bare = write_shard("bare.tar", [{"__key__": "0", "png": b"", "cls": b"1"}])
    with pytest.raises(InputError, match="no captions"):
        filter_shards(bare, out, Criteria(min_score=0.2, model="m"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.tar", "mixed"]
