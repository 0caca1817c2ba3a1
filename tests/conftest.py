"""What tests of several packages share: embeddings folders from vectors, shards of shapes, a tiny recipe."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from webdataset.writer import TarWriter

from clipkit.files import write_manifest

WriteEmbeddings = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have what tests, and the processes they start and kill, leave behind deleted with the run's folder."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None


@pytest.fixture
def write_embeddings() -> WriteEmbeddings:
    """A function that writes an embeddings folder as `clipkit embed` does."""

    def write(
        folder: Path,
        vectors: np.ndarray,
        *,
        parts: int = 1,
        ids: list[int] | None = None,
        columns: dict[str, list[Any]] | None = None,
        thumbnails: bool = True,
        model: dict[str, Any] | None = None,
    ) -> Path:
        count, dim = vectors.shape
        keys = list(range(count)) if ids is None else ids
        table = pa.table(
            {
                "image_path": [f"{key:09d}" for key in keys],
                "caption": [f"picture {key}" for key in keys],
                **(columns or {}),
                "id": pa.array(keys, pa.int64()),
            }
        )
        digits = len(str(parts))
        for name in ("img_emb", "text_emb", "metadata", "thumbnails"):
            (folder / name).mkdir(parents=True)
        sizes = []
        for i, rows in enumerate(np.array_split(np.arange(count), parts)):
            start, size = (int(rows[0]) if len(rows) else 0), len(rows)
            sizes.append(size)
            half = vectors[rows].astype(np.float16)
            np.save(folder / f"img_emb/img_emb_{i:0{digits}d}.npy", half)
            np.save(folder / f"text_emb/text_emb_{i:0{digits}d}.npy", half)
            pq.write_table(table.slice(start, size), folder / f"metadata/metadata_{i:0{digits}d}.parquet")
            if thumbnails:
                small = {"id": keys[start : start + size], "image": [f"picture {k}".encode() for k in rows]}
                pq.write_table(pa.table(small), folder / f"thumbnails/thumbnails_{i:0{digits}d}.parquet")
        described = {"fingerprint": "f" * 64, "name": "a-model", "dim": dim, "scale": 14.3, "bias": None}
        write_manifest(
            folder,
            "embeddings",
            model={**described, "scoring": "softmax", **(model or {})},
            source="test",
            rows=count,
            parts=[{"rows": size} for size in sizes],
        )
        return folder

    return write


COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "cross")


def draw_shape(colour: str, shape: str, size: int, side: int = 32) -> bytes:
    """A picture (PNG) of a coloured shape on white."""
    image = Image.new("RGB", (side, side), "white")
    draw, low, high = ImageDraw.Draw(image), (side - size) // 2, (side + size) // 2
    middle = side // 2
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=colour)
    else:
        draw.line((low, low, high, high), fill=colour, width=4)
        draw.line((low, high, high, low), fill=colour, width=4)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shape_pictures(sizes: Sequence[int]) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Caption, picture and metadata of every colour, shape and size."""
    for size in sizes:
        for colour in COLOURS:
            for shape in SHAPES:
                meta = {"colour": colour, "shape": shape, "name_zh": f"{colour}的{shape}"}
                yield f"{colour} {shape}", draw_shape(colour, shape, size), meta


@pytest.fixture(scope="session")
def shape_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of coloured shapes with captions: `train` (72 pictures, two shards) and `heldout` (24)."""
    root = tmp_path_factory.mktemp("shapes")
    for split, sizes in {"train": (14, 18, 22), "heldout": (20,)}.items():
        samples = list(shape_pictures(sizes))
        half = (len(samples) + 1) // 2 if split == "train" else len(samples)
        (root / split).mkdir()
        for shard, start in enumerate(range(0, len(samples), half)):
            with (
                (root / split / f"{shard:05d}.tar").open("wb") as file,
                TarWriter(file, mtime=0, encoder=False) as writer,
            ):
                for place, (caption, picture, meta) in enumerate(samples[start : start + half]):
                    key = f"{shard:05d}{place:04d}"
                    text = {"txt": caption.encode(), "json": json.dumps(meta).encode()}
                    writer.write({"__key__": key, "png": picture, **text})
    return root


TINY_RECIPE = """
step: clip
max_steps: 6
precision: fp32
device: cpu
evaluations: 2
checkpoints: 2
model:
  dim: 32
  image: {name: cnn, widths: [16, 32], depths: [1, 1], stem: 4, groups: 4}
  text: {name: transformer, width: 32, layers: 1, heads: 2}
  tokenizer: {name: clip, context_length: 16}
  preprocess: {size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], resize: squash}
data:
  train: TRAIN
  heldout: HELDOUT
  batch_size: 24
  cache: true
  captions: {caption: 0.8, name_zh: 0.2}
  augment: {rotate: 10, translate: 0.1, brightness: 0.2}
optim: {lr: 0.003, warmup_steps: 2}
zero_shot_field: colour
"""


@pytest.fixture
def tiny_recipe(shape_shards: Path, tmp_path: Path) -> Path:
    """A recipe that trains a tiny model on the shapes for six steps."""
    text = TINY_RECIPE.replace("TRAIN", str(shape_shards / "train"))
    path = tmp_path / "tiny.yaml"
    path.write_text(text.replace("HELDOUT", str(shape_shards / "heldout")))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file's tests in one worker, and all end-to-end tests in one: they share one walk."""
    for item in items:
        folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        item.add_marker(pytest.mark.xdist_group("e2e" if folder == "e2e" else str(item.path)))
