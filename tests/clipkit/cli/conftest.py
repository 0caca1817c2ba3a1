"""A tiny random model, twelve pictures, and an index of their embeddings made with it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.cli import main
from clipkit.images import Preprocess
from clipkit.index import build_index
from clipkit.models import DualEncoder, ModelConfig, build_model, save_model


@dataclass(frozen=True)
class World:
    model: Path
    pictures: list[Path]
    embeddings: Path
    index: Path


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def tiny_model(seed: int) -> DualEncoder:
    config = ModelConfig(
        image={"name": "cnn", "widths": (8, 16), "depths": (1, 1), "groups": 4},
        text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        dim=8,
        preprocess=Preprocess(size=32),
        tokenizer={"name": "clip", "context_length": 16},
    )
    return build_model(config, seed=seed).eval()


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model folders with different weights."""
    folders = tuple(tmp_path_factory.mktemp("models") / name for name in ("model", "other"))
    for seed, folder in enumerate(folders):
        save_model(tiny_model(seed), folder)
    return folders[0], folders[1]


@pytest.fixture
def world(tmp_path: Path, small_models: tuple[Path, Path], write_embeddings: Callable[..., Path]) -> World:
    model = tiny_model(0)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(12)]
    pictures = [tmp_path / f"picture{i}.png" for i in range(len(images))]
    for image, path in zip(images, pictures, strict=True):
        image.save(path)
    with torch.inference_mode():
        vectors = model.encode_image(model.preprocess(images)).numpy()
    described = {"fingerprint": model.fingerprint, "name": str(small_models[0]), "dim": 8}
    columns = {"name": [f"picture number {i}" for i in range(12)]}
    embeddings = write_embeddings(tmp_path / "embeddings", vectors, columns=columns, model=described)
    return World(small_models[0], pictures, embeddings, build_index(embeddings, tmp_path / "index"))


@pytest.fixture
def clipkit(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs `clipkit ARGUMENTS` in this process."""

    def run(*arguments: object) -> Result:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
