"""Small real shards and pictures for the tests of `clipkit_data`."""

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter


def make_picture(number: int, side: int = 24, kind: str = "PNG") -> bytes:
    """A smooth picture of its own for each number."""
    axis = np.linspace(0, 1, side)
    grey = np.outer(axis, np.roll(axis, number)) * 200
    pixels = np.stack([grey, np.full_like(grey, number * 37 % 256), grey.T], axis=-1).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_samples(count: int, start: int = 0) -> Iterator[dict[str, object]]:
    """Samples as `webdataset.TarWriter` takes them."""
    for number in range(start, start + count):
        meta = {"key": f"{number:09d}", "name": f"name {number}", "keywords": [f"a{number}", f"b{number}"]}
        yield {
            "__key__": f"{number:09d}",
            "png": make_picture(number),
            "txt": f"caption {number}".encode(),
            "json": json.dumps(meta).encode(),
        }


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Makes the bytes of a picture: `picture(number, side=24, kind="PNG")`."""
    return make_picture


@pytest.fixture
def write_shard(tmp_path: Path) -> Callable[..., Path]:
    """Writes a shard through webdataset: `write_shard(name, samples)`, or a number of samples to make."""

    def write(name: str, samples: object = 5, start: int = 0, folder: Path | None = None) -> Path:
        path = (folder or tmp_path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = make_samples(samples, start) if isinstance(samples, int) else samples
        with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as writer:
            for sample in made:  # pyright: ignore[reportGeneralTypeIssues]
                writer.write(sample)
        return path

    return write


@pytest.fixture
def shards(write_shard: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of two shards, 7 and 6 samples."""
    write_shard("shards/00000.tar", 7)
    write_shard("shards/00001.tar", 6, start=7)
    return tmp_path / "shards"
