"""A served world: a tiny random model, twelve pictures, an index of them, and a client of the ASGI app."""

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from clipkit.files import write_manifest
from clipkit.images import Preprocess
from clipkit.index import build_index
from clipkit.models import DualEncoder, ModelConfig, build_model, save_model
from clipkit_service import Settings, create_app


class World(NamedTuple):
    model: Path
    other_model: Path
    shop: Path
    pictures: list[bytes]
    encoder: DualEncoder

    def settings(self, **given: Any) -> Settings:
        return Settings(**{"model": str(self.model), "index": self.shop, **given})


def tiny_model(seed: int) -> DualEncoder:
    config = ModelConfig(
        image={"name": "cnn", "widths": (8, 16), "depths": (1, 1), "groups": 4},
        text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        dim=8,
        preprocess=Preprocess(size=32),
        tokenizer={"name": "clip", "context_length": 16},
    )
    return build_model(config, seed=seed).eval().requires_grad_(False)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_index(root: Path, model: DualEncoder, pictures: list[bytes]) -> Path:
    """An index of the pictures, made through an embeddings folder."""
    folder = root / "embeddings"
    for name in ("img_emb", "text_emb", "metadata", "thumbnails"):
        (folder / name).mkdir(parents=True)
    images = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    with torch.inference_mode():
        vectors = model.encode_image(model.preprocess(images)).numpy().astype(np.float16)
    for name in ("img_emb", "text_emb"):
        np.save(folder / name / f"{name}_0.npy", vectors)
    ids = list(range(len(images)))
    columns = {"image_path": [f"{i:09d}" for i in ids], "caption": [f"picture {i}" for i in ids], "id": ids}
    pq.write_table(pa.table(columns), folder / "metadata/metadata_0.parquet")
    small = {"id": ids, "image": [encoded(image, "WEBP") for image in images]}
    pq.write_table(pa.table(small), folder / "thumbnails/thumbnails_0.parquet")
    described = {"fingerprint": model.fingerprint, "name": "tiny", "dim": model.dim, "scoring": model.scoring}
    scale = {"scale": model.scale.item(), "bias": None}
    write_manifest(
        folder,
        "embeddings",
        model={**described, **scale},
        source="test",
        rows=len(ids),
        parts=[{"rows": len(ids)}],
    )
    return build_index(folder, root / "shop")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = tiny_model(0)
    save_model(model, root / "tiny")
    save_model(tiny_model(1), root / "other")
    rng = np.random.default_rng(0)
    pictures = [
        encoded(Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))) for _ in range(12)
    ]
    return World(root / "tiny", root / "other", write_index(root, model, pictures), pictures, model)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def running(app: FastAPI, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app while its lifespan runs."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000", headers=headers
        ) as client,
    ):
        yield client


@pytest.fixture(scope="module")
async def client(world: World, anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    async with running(create_app(world.settings())) as client:
        yield client


@pytest.fixture
def serve() -> Any:
    """`running`, for tests with settings of their own."""
    return running
