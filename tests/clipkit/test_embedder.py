"""Embedder: inputs of every kind, batching, order, and faults that name the element."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.embedder import Embedder
from clipkit.errors import ClipkitError, ConfigError, ImageError, InputError, NotFoundError
from clipkit.images import Preprocess
from clipkit.models import DualEncoder, ModelConfig, build_model, save_model

CONFIG = ModelConfig(
    image={"name": "cnn", "widths": [8, 16], "depths": [1, 1]},
    text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
    dim=6,
    preprocess=Preprocess(size=16),
    tokenizer={"name": "clip", "context_length": 24},
)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build_model(CONFIG, seed=0).eval()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(7)]


def test_every_kind_of_picture_gives_the_same_row(
    model: DualEncoder, pictures: list[Image.Image], tmp_path: Path
) -> None:
    file = BytesIO()
    pictures[0].save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    path = tmp_path / "a.png"
    kinds = [pictures[0], file.getvalue(), path, str(path), np.asarray(pictures[0])]
    rows = Embedder(model).images(kinds)
    assert (rows.dtype, rows.shape) == (np.float32, (5, 6))
    np.testing.assert_allclose(rows, np.tile(rows[:1], (5, 1)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_change_the_result(
    batch_size: int, model: DualEncoder, pictures: list[Image.Image]
) -> None:
    embedder = Embedder(model, batch_size=batch_size)
    texts = ["a", "two dogs and a rather long caption of a cat", "b c", "d", "e"]
    with torch.no_grad():
        expected = model.encode_text(model.tokenizer.encode(texts)).numpy()
        pixels = torch.stack([model.preprocess.uint8(picture) for picture in pictures])
        seen = model.encode_image(pixels).numpy()
    np.testing.assert_allclose(embedder.texts(texts), expected, atol=1e-6)
    np.testing.assert_allclose(embedder.images(pictures), seen, atol=1e-6)


def test_no_inputs(model: DualEncoder) -> None:
    embedder = Embedder(model)
    assert (embedder.images([]).shape, embedder.texts([]).shape, embedder.dim) == ((0, 6), (0, 6), 6)


def test_faults_name_the_element(model: DualEncoder, pictures: list[Image.Image], tmp_path: Path) -> None:
    embedder = Embedder(model, batch_size=2)
    with pytest.raises(ImageError, match="image 3 cannot be decoded") as caught:
        embedder.images([*pictures[:3], b"\xff\xd8\xff not a picture"])
    assert caught.value.reason == "undecodable"
    with pytest.raises(NotFoundError, match=r"nothing\.png"):
        embedder.images([tmp_path / "nothing.png"])
    with pytest.raises(ImageError, match="at most 100 pixels"):
        Embedder(model, max_pixels=100).images([np.asarray(pictures[0])])
    for wrong, message in (
        ([*"ab", 3], "text 2: expected a string, got int"),
        (["a", " "], "text 1 is empty"),
        (["a\ud800"], "text 0 is no valid Unicode"),
        ("a text", "expected a list of strings"),
    ):
        with pytest.raises(InputError, match=message):
            embedder.texts(wrong)  # type: ignore[arg-type]
    for single in (pictures[0], b"bytes", "path"):
        with pytest.raises(InputError, match="expected a list of pictures"):
            embedder.images(single)  # type: ignore[arg-type]


def test_a_model_in_training_is_handed_back_in_training(model: DualEncoder) -> None:
    training = build_model(
        CONFIG.model_copy(update={"text": {**CONFIG.text, "dropout": 0.5}}), seed=0
    ).train()
    embedder = Embedder(training)
    assert np.array_equal(embedder.texts(["a cat"]), embedder.texts(["a cat"])), "no dropout"
    assert training.training
    assert all(module.training for module in training.modules())


def test_a_diverged_model_is_reported() -> None:
    model = build_model(CONFIG, seed=0)
    with torch.no_grad():
        next(model.text_projection.parameters())[0, 0] = float("nan")
    with pytest.raises(ClipkitError, match="no finite embedding of text 0"):
        Embedder(model).texts(["a"])


def test_loads_by_name_and_fails_early(model: DualEncoder, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    rows = Embedder(str(tmp_path / "m"), device="cpu").texts(["a cat"])
    np.testing.assert_allclose(rows, Embedder(model).texts(["a cat"]), atol=1e-6)
    with pytest.raises(NotFoundError, match="no such model folder"):
        Embedder(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="batch_size"):
        Embedder(model, batch_size=0)


def test_vectors_have_no_gradient_history(model: DualEncoder) -> None:
    assert Embedder(model).texts(["a"]).flags.writeable
