"""Hostile pictures and failing models: each fails alone, with its own status, and the service stays ready."""

import asyncio
import base64
import io
import struct
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.images import Preprocess
from clipkit.models import DualEncoder, ModelConfig, build_model
from clipkit_service import Settings, create_app
from clipkit_service.engine import Artifacts, Engine

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def tiny_model() -> DualEncoder:
    config = ModelConfig(
        image={"name": "cnn", "widths": (8, 16), "depths": (1, 1), "groups": 4},
        text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        dim=8,
        preprocess=Preprocess(size=32),
        tokenizer={"name": "clip", "context_length": 16},
    )
    return build_model(config, seed=0).eval().requires_grad_(False)


@asynccontextmanager
async def serving(model: DualEncoder, **given: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Engine]]:
    settings = Settings(**{"model": "tiny", "ready_timeout_s": 0.5, **given})
    app = create_app(settings, Artifacts(model, "tiny", None, "default", 0))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
    ):
        yield client, app.state.engine


@pytest.fixture(scope="module")
async def client(anyio_backend: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tiny_model()) as (client, _):
        yield client


# Pictures

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG with any size in its header."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def corpus() -> dict[str, tuple[bytes, int]]:
    """Pictures by name, each with the status it deserves."""
    palette = NOISE.convert("P")
    frames = [Image.new("P", (20, 20), i) for i in range(50)]
    deep = Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    found = {
        "one pixel": (encoded(Image.new("RGB", (1, 1)), "PNG"), 200),
        "one row": (encoded(Image.new("RGB", (3000, 1)), "PNG"), 200),
        "CMYK": (encoded(NOISE.convert("CMYK"), "JPEG"), 200),
        "16 bit": (encoded(deep, "PNG"), 200),
        "palette with transparency": (encoded(palette, "PNG", transparency=3), 200),
        "grey with alpha": (encoded(NOISE.convert("LA"), "PNG"), 200),
        "1 bit": (encoded(NOISE.convert("1"), "PNG"), 200),
        "animated GIF": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 200),
        "rotated": (encoded(NOISE, "JPEG", exif=rotated), 200),
        "WebP": (encoded(NOISE, "WEBP"), 200),
        "BMP": (encoded(NOISE, "BMP"), 200),
        "bomb": (png(30_000, 30_000, zlib.compress(b"\0" * 100_000)), 413),
        "large bomb": (png(2**31 - 1, 2**31 - 1, b""), 413),
        "17 megapixels": (encoded(Image.new("1", (4123, 4124)), "PNG"), 413),
        "no pixels": (png(0, 0, b""), 422),
        "no data": (png(10, 10, b""), 422),
        "damaged data": (png(10, 10, b"not deflate"), 422),
        "TIFF named JPEG": (encoded(NOISE, "TIFF"), 415),
        "EPS named JPEG": (encoded(NOISE, "EPS"), 415),
        "SVG named PNG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        "PDF named PNG": (encoded(NOISE, "PDF"), 415),
        "text": (b"hello", 415),
        "empty": (b"", 422),
    }
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(NOISE, kind)
        for tenth in range(1, 10):
            found[f"{kind} cut at {tenth}0 %"] = (whole[: len(whole) * tenth // 10], 422)
    return found


async def test_every_hostile_picture_fails_alone(client: httpx.AsyncClient) -> None:
    """Each with its own status, while a good picture sent at the same time succeeds."""
    good = {"file": ("good.png", encoded(NOISE, "PNG")), "labels": (None, "cat,dog")}
    wanted = (await client.post("/v1/classify", files=good)).json()
    for name, (data, status) in corpus().items():
        bad = {"file": ("picture.jpg", data), "labels": (None, "cat,dog")}
        hostile, fine = await asyncio.gather(
            client.post("/v1/classify", files=bad), client.post("/v1/classify", files=good)
        )
        assert hostile.status_code == status, (name, hostile.text)
        if status != 200:
            assert hostile.json()["errors"][0]["pointer"] == "/file/0", name
        assert fine.status_code == 200
        assert fine.json()["data"][0][0]["score"] == pytest.approx(wanted["data"][0][0]["score"], abs=1e-5)
    ready = await client.get("/readyz")
    assert ready.status_code == 200
    assert "clipkit_worker_restarts_total{" not in (await client.get("/metrics")).text


async def test_all_bad_pictures_of_a_request_are_named(client: httpx.AsyncClient) -> None:
    coded = [
        base64.b64encode(data).decode() for data in (encoded(NOISE, "PNG"), b"x", encoded(NOISE, "PNG")[:99])
    ]
    response = await client.post("/v1/classify", json={"images": coded, "labels": ["cat"]})
    assert response.status_code == 415
    assert [error["pointer"] for error in response.json()["errors"]] == ["/images/1", "/images/2"]


async def test_pictures_beyond_the_byte_limit(anyio_backend: str) -> None:
    async with serving(tiny_model(), max_image_bytes=1000) as (client, _):
        data = encoded(NOISE, "PNG")
        coded = base64.b64encode(data).decode()
        for response in (
            await client.post("/v1/embeddings/images", files={"files": data}),
            await client.post("/v1/embeddings", json={"input": {"image": coded}}),
        ):
            assert (response.status_code, response.json()["code"]) == (413, "image_too_large")


# The model


class Fault:
    """Makes a model fail on pictures whose first pixel is black, in a way that can be chosen."""

    def __init__(self, model: DualEncoder) -> None:
        self.model, self.encode = model, model.encode_image
        self.kind = "none"
        model.encode_image = self  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        black = pixels[:, :, 0, 0].sum(dim=1) == 0
        if self.kind == "raise" and black.any():
            raise RuntimeError("a kernel failed")
        if self.kind == "exit" and black.any():
            raise SystemExit(1)
        if self.kind == "dead":
            raise RuntimeError("the device is gone")
        if self.kind == "hang":
            time.sleep(1.2)
        vectors = self.encode(pixels)
        if self.kind == "nan":
            vectors[black] = float("nan")
        if self.kind == "shape":
            vectors = vectors[:-1]
        return vectors


BLACK = encoded(Image.new("RGB", (32, 32)), "PNG")
WHITE = encoded(Image.new("RGB", (32, 32), "white"), "PNG")


async def embed(client: httpx.AsyncClient, *pictures: bytes) -> httpx.Response:
    return await client.post("/v1/embeddings/images", files=[("files", picture) for picture in pictures])


@pytest.mark.parametrize("kind", ["raise", "exit", "nan"])
async def test_model_failure_hits_only_its_cause(kind: str, anyio_backend: str) -> None:
    model = tiny_model()
    fault = Fault(model)
    async with serving(model) as (client, _):
        whole = (await embed(client, WHITE)).json()["data"]
        fault.kind = kind
        answers = await asyncio.gather(
            *(embed(client, p) for p in (WHITE, BLACK, WHITE, WHITE, BLACK, WHITE))
        )
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200, 500, 200]
        for answer in answers:
            if answer.status_code == 200:
                np.testing.assert_allclose(
                    answer.json()["data"][0]["embedding"], whole[0]["embedding"], atol=1e-5
                )
        mixed = await embed(client, WHITE, BLACK)
        assert mixed.status_code == 500
        assert [error["pointer"] for error in mixed.json()["errors"]] == ["/files/1"]
        assert "kernel" not in mixed.text
        assert (await client.get("/readyz")).status_code == 200


@pytest.mark.parametrize("kind", ["dead", "shape"])
async def test_dead_model_is_not_ready_and_recovers(kind: str, anyio_backend: str) -> None:
    model = tiny_model()
    fault = Fault(model)
    async with serving(model) as (client, _):
        fault.kind = kind
        assert (await embed(client, WHITE)).status_code == 500
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert "image model failed" in ready.json()["reasons"][0]
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.post("/v1/embeddings", json={"input": "cat"})).status_code == 200
        fault.kind = "none"
        assert (await client.get("/readyz")).status_code == 200
        assert (await embed(client, WHITE)).status_code == 200


async def test_deadline_is_504_and_the_hang_shows(anyio_backend: str) -> None:
    model = tiny_model()
    fault = Fault(model)
    async with serving(model, deadline_s=0.9) as (client, engine):
        fault.kind = "hang"
        engine.images.last_success = -1e9
        late, ready = await asyncio.gather(embed(client, WHITE), client.get("/readyz"))
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        # its two probes take longer than a request may: they have a limit of their own
        assert ready.status_code == 503
        assert ready.json()["reasons"][0] == "the image model did not answer within 0.5 s"
        fault.kind = "none"
        await asyncio.sleep(0.5)
        assert (await embed(client, WHITE)).status_code == 200
        assert engine.images.depth == 0


async def test_killed_worker_flips_readiness_and_comes_back(anyio_backend: str) -> None:
    async with serving(tiny_model()) as (client, engine):
        worker = engine.texts.worker
        assert worker is not None
        worker.cancel()
        await asyncio.sleep(0.05)
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["the text worker is down"])
        late = await client.post("/v1/embeddings", json={"input": "cat"})
        assert late.status_code == 200
        assert (await client.get("/readyz")).status_code == 200
        assert 'clipkit_worker_restarts_total{queue="text"} 1.0' in (await client.get("/metrics")).text


async def test_overload_is_429_with_a_time_and_the_rest_succeeds(anyio_backend: str) -> None:
    model = tiny_model()
    async with serving(model, queue_items=8, max_batch=4, text_cache_items=0) as (client, _):
        answers = await asyncio.gather(
            *(client.post("/v1/embeddings", json={"input": f"text {i}"}) for i in range(40))
        )
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        assert (await client.post("/v1/embeddings", json={"input": "later"})).status_code == 200


async def test_unforeseen_error_is_opaque(anyio_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("the password is hunter2")

    async with serving(tiny_model()) as (client, engine):
        monkeypatch.setattr(engine, "check_model_name", broken)
        response = await client.post("/v1/embeddings", json={"input": "cat"})
        assert (response.status_code, response.json()["code"]) == (500, "internal_error")
        assert "hunter2" not in response.text
        assert response.headers["x-request-id"] == response.json()["request_id"]
