"""Embeddings folders: clip-retrieval's layout, resumable after a kill, refused when something differs."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipkit.errors import ArtifactError, DataError, MismatchError, NotFoundError
from clipkit.files import read_manifest
from clipkit.images import Preprocess, decode_image
from clipkit.models import DualEncoder, ModelConfig, build_model, save_model
from clipkit_data.dataset import ShardDataset
from clipkit_data.embedding import embed
from clipkit_data.metadata import flatten, metadata_table
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards

CONFIG = ModelConfig(
    image={"name": "cnn", "widths": (8, 16), "depths": (1, 1), "groups": 4},
    text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
    dim=12,
    preprocess=Preprocess(size=16),
    tokenizer={"name": "clip", "context_length": 16},
)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build_model(CONFIG, seed=0).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, whose time differs."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "clipkit.json"
    }


def test_the_folder_is_as_clip_retrieval_writes_it(model: DualEncoder, shards: Path, tmp_path: Path) -> None:
    done: list[int] = []
    manifest = embed(model, shards, tmp_path / "out", part_rows=5, batch_size=4, progress=done.append)
    assert sum(done) == manifest["rows"] == 13
    assert [part["rows"] for part in manifest["parts"]] == [5, 5, 3]
    names = sorted(path.name for path in (tmp_path / "out").glob("*_emb/*"))
    assert names == [f"{kind}_emb_{part}.npy" for kind in ("img", "text") for part in range(3)]
    dataset = ShardDataset(resolve_shards(shards))
    images, texts = (
        np.concatenate([np.load(path) for path in sorted((tmp_path / "out" / kind).iterdir())])
        for kind in ("img_emb", "text_emb")
    )
    assert images.dtype == texts.dtype == np.float16
    assert images.shape == texts.shape == (13, 12)
    assert images.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(images.astype(np.float64), axis=1), 1, atol=2e-3)
    with torch.inference_mode():
        for position in range(13):
            record = dataset[position]
            pixels = model.preprocess([decode_image(record.image)])
            np.testing.assert_allclose(images[position], model.encode_image(pixels)[0], atol=1e-3)
            text = model.encode_text(model.tokenizer.encode([record.caption or ""]))[0]
            np.testing.assert_allclose(texts[position], text, atol=1e-3)


def test_metadata_thumbnails_and_manifest(model: DualEncoder, shards: Path, tmp_path: Path) -> None:
    manifest = embed(model, shards, tmp_path / "out", thumbnail_size=8)
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert table.column_names == ["image_path", "caption", "key", "name", "keywords", "id"]
    assert table["id"].to_pylist() == list(range(13))
    assert table["caption"][8].as_py() == "caption 8"
    assert table["keywords"][8].as_py() == ["a8", "b8"]
    small = pq.read_table(tmp_path / "out/thumbnails/thumbnails_0.parquet")
    assert small.column_names == ["id", "image"]
    thumbnail = Image.open(BytesIO(small["image"][0].as_py()))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (8, 8))
    assert read_manifest(tmp_path / "out", "embeddings") == manifest
    expected = {
        "name": "in memory",
        "fingerprint": model.fingerprint,
        "dim": 12,
        "scale": pytest.approx(1 / 0.07),
        "bias": None,
        "scoring": "softmax",
    }
    assert manifest["model"] == expected
    assert manifest["source"]["name"] == str(shards)
    assert manifest["source"]["samples"] == 13
    assert manifest["faults"] == {}


def test_workers_change_nothing(model: DualEncoder, shards: Path, tmp_path: Path) -> None:
    embed(model, shards, tmp_path / "a", part_rows=5, batch_size=2)
    embed(model, shards, tmp_path / "b", part_rows=5, batch_size=2, workers=2)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_part_numbers_are_padded_as_in_clip_retrieval(
    model: DualEncoder, shards: Path, tmp_path: Path
) -> None:
    embed(model, shards, tmp_path / "out", part_rows=1, thumbnail_size=0)
    names = sorted(path.name for path in (tmp_path / "out/img_emb").iterdir())
    digits = int(math.log10(13)) + 1
    assert names == [f"img_emb_{part:0{digits}d}.npy" for part in range(13)]
    assert not (tmp_path / "out/thumbnails").exists()


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from clipkit_data.embedding import embed
seen = []
def progress(rows):
    seen.append(rows)
    if sum(seen) >= 8:
        os.kill(os.getpid(), signal.SIGKILL)
embed(sys.argv[1], sys.argv[2], sys.argv[3], part_rows=5, batch_size=2, progress=progress)
"""


def test_a_rerun_after_a_kill_goes_on(model: DualEncoder, shards: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "model", shards, tmp_path / "out"])
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "out/parts").iterdir()) == ["part_0.json"]
    with pytest.raises(ArtifactError, match=r"it has no clipkit\.json"):
        read_manifest(tmp_path / "out", "embeddings")
    first = tmp_path / "out/img_emb/img_emb_0.npy"
    (tmp_path / "out/img_emb/.img_emb_1.npy.x1y2").write_bytes(b"left by the killed process")
    written = first.stat().st_mtime_ns
    manifest = embed(tmp_path / "model", shards, tmp_path / "out", part_rows=5, batch_size=2)
    assert first.stat().st_mtime_ns == written
    assert not [name for name in manifest["files"] if "/." in name]
    embed(tmp_path / "model", shards, tmp_path / "whole", part_rows=5, batch_size=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_finished_folder_is_returned_and_a_damaged_part_made_again(
    model: DualEncoder, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    manifest = embed(model, shards, out, part_rows=5)
    assert embed(model, shards, out, part_rows=5) == manifest
    before = files_of(out)
    (out / "clipkit.json").unlink()
    (out / "img_emb/img_emb_1.npy").write_bytes(b"damaged")
    embed(model, shards, out, part_rows=5)
    assert files_of(out) == before


def test_another_job_is_refused(
    model: DualEncoder, shards: Path, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    embed(model, shards, tmp_path / "out")
    with pytest.raises(MismatchError, match="begun with another model"):
        embed(build_model(CONFIG, seed=1), shards, tmp_path / "out")
    with pytest.raises(MismatchError, match="begun with another source"):
        embed(model, write_shard("other/00000.tar", 2), tmp_path / "out")
    with pytest.raises(MismatchError, match="thumbnail size"):
        embed(model, shards, tmp_path / "out", thumbnail_size=0)
    with pytest.raises(ArtifactError, match="already exists"):
        embed(model, shards, shards)
    with pytest.raises(NotFoundError):
        embed(model, tmp_path / "nothing", tmp_path / "other")


def test_bad_pictures_are_counted_and_listed(
    model: DualEncoder, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(picture(number, side=40))
    (folder / "1.png").write_bytes(picture(1, side=40)[:200])
    (folder / "3.png").write_bytes(b"")
    (folder / "old.tiff").write_bytes(b"II*\0")
    manifest = embed(model, folder, tmp_path / "out")
    assert manifest["rows"] == 2
    assert manifest["faults"] == {"picture empty": 1, "picture format": 1, "picture undecodable": 1}
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert table["image_path"].to_pylist() == ["0.png", "2.png"]
    assert table["id"].to_pylist() == [0, 2]
    lines = (tmp_path / "out/faults.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["1.png", "3.png", "old.tiff"]
    for path in (folder / "0.png", folder / "2.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"no picture of .* could be embedded"):
        embed(model, folder, tmp_path / "none")
    assert not (tmp_path / "none/clipkit.json").exists()


def test_pictures_without_captions(
    model: DualEncoder, tmp_path: Path, write_shard: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    samples = [{"__key__": f"{number}", "png": picture(number)} for number in range(3)]
    manifest = embed(model, write_shard("a/00000.tar", samples), tmp_path / "out")
    assert manifest["rows"] == 3
    assert not (tmp_path / "out/text_emb").exists()
    table = pq.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert table.column_names == ["image_path", "id"]


def test_metadata_of_all_kinds() -> None:
    metas = [
        {"id": "x1", "caption": "dropped", "a": {"b": 1, "c": {"d": 2}}, "mixed": 1, "big": 2**70},
        {"only": "here", "mixed": "text", "list": [1, 2]},
    ]
    records = [Record((0, n), f"k{n}", b"", f"c{n}", meta) for n, meta in enumerate(metas)]
    table = metadata_table(records, [5, 6], captions=True)
    assert table.column_names == [
        "image_path", "caption", "source_id", "a.b", "a.c.d", "mixed", "big", "only", "list", "id",
    ]  # fmt: skip
    first, second = table.to_pylist()
    assert first["caption"] == "c0"
    assert (first["mixed"], second["mixed"]) == ("1", "text")
    assert first["big"] == str(2**70)
    assert (first["only"], second["list"], second["id"]) == (None, [1, 2], 6)
    assert flatten({"a": {}, "b": {"c": None}}) == {"b.c": None}
