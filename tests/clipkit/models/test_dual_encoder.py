"""The model itself: normalisation, temperature, bias, trimming, gradients, fingerprint, seeds."""

import math

import pytest
import torch

from clipkit.errors import ConfigError, NotFoundError
from clipkit.images import Preprocess
from clipkit.models import DualEncoder, ModelConfig, build_model
from clipkit.models.fingerprint import Fingerprint
from clipkit.text import build_tokenizer

CONFIG = ModelConfig(
    image={"name": "cnn", "widths": [8, 16], "depths": [1, 1]},
    text={"name": "transformer", "width": 24, "layers": 2, "heads": 2},
    dim=12,
    preprocess=Preprocess(size=16),
    tokenizer={"name": "clip", "context_length": 24},
)
TEXTS = ["a cat", "a dog that runs over a very long road", "", "x"]


@pytest.fixture
def model() -> DualEncoder:
    return build_model(CONFIG, seed=3).eval()


def weight(projection: torch.nn.Module) -> torch.Tensor:
    assert isinstance(projection, torch.nn.Linear)
    return projection.weight


def test_embeddings_are_unit_rows_of_one_dimension(model: DualEncoder) -> None:
    pixels, ids = torch.rand(4, 3, 16, 16), model.tokenizer.encode(TEXTS)
    image_ND, text_ND, scale, bias = model(pixels, ids)
    assert (image_ND.shape, text_ND.shape, bias) == ((4, 12), (4, 12), None)
    for features in (image_ND, text_ND):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert scale.item() == pytest.approx(1 / 0.07)
    assert weight(model.image_projection).shape == (12, 16)
    assert weight(model.text_projection).shape == (12, 24)
    assert model.image_projection.bias is None


def test_projections_start_with_the_standard_deviation_of_their_width() -> None:
    wide = build_model(CONFIG.model_copy(update={"dim": 4096}), seed=0)
    for projection, width in ((wide.image_projection, 16), (wide.text_projection, 24)):
        assert weight(projection).std().item() == pytest.approx(width**-0.5, rel=0.02)


def test_uint8_pixels_are_normalised_inside(model: DualEncoder) -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    normalised = model.preprocess.normalize(pixels)
    torch.testing.assert_close(model.encode_image(pixels), model.encode_image(normalised))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_fp32_and_unit_under_autocast(model: DualEncoder, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        image_ND, text_ND, scale, _ = model(torch.rand(2, 3, 16, 16), model.tokenizer.encode(TEXTS[:2]))
    for features in (image_ND, text_ND):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(2), atol=1e-6, rtol=0)
    assert scale.dtype == torch.float32


def test_trimming_changes_nothing(model: DualEncoder) -> None:
    ids = model.tokenizer.encode(["a cat", "x"])
    assert model.tokenize(["a cat", "x"]).shape == (2, 8)
    whole = torch.nn.functional.normalize(model.text_projection(model.text(ids)), dim=-1)
    torch.testing.assert_close(model.encode_text(ids), whole, atol=1e-6, rtol=0)


def test_a_zero_feature_gives_a_zero_row_not_nan(model: DualEncoder) -> None:
    torch.nn.init.zeros_(weight(model.image_projection))
    assert torch.equal(model.encode_image(torch.rand(1, 3, 16, 16)), torch.zeros(1, 12))


def test_scale_is_clamped_to_one_and_a_hundred(model: DualEncoder) -> None:
    for value, kept in ((9.0, math.log(100)), (-3.0, 0.0), (2.0, 2.0)):
        model.log_scale.data.fill_(value)
        model.clamp_scale_()
        assert model.log_scale.item() == pytest.approx(kept)
    assert model.log_scale.requires_grad


def test_sigmoid_models_start_with_siglips_scale_and_bias() -> None:
    model = build_model(CONFIG.model_copy(update={"scoring": "sigmoid"}))
    _, _, scale, bias = model(torch.rand(1, 3, 16, 16), model.tokenizer.encode(["a"]))
    assert bias is not None
    assert (scale.item(), bias.item()) == (pytest.approx(10), -10)
    given = build_model(CONFIG.model_copy(update={"init_scale": 5.0, "init_bias": 0.0}))
    assert given.bias is not None
    assert (given.scale.item(), given.bias.item()) == (pytest.approx(5), 0)


def test_every_parameter_gets_a_gradient(model: DualEncoder) -> None:
    model.train()
    image_ND, text_ND, scale, _ = model(torch.rand(3, 3, 16, 16), model.tokenizer.encode(TEXTS[:3]))
    torch.nn.functional.cross_entropy(scale * image_ND @ text_ND.T, torch.arange(3)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_seed_fixes_the_weights_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second, other = (build_model(CONFIG, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(1), expected)
    assert first.fingerprint == second.fingerprint != other.fingerprint


def test_fingerprint_covers_weights_preprocessing_tokenizer_and_scoring(model: DualEncoder) -> None:
    seen = {model.fingerprint}
    assert model.fingerprint in seen, "stable"
    with torch.no_grad():
        weight(model.image_projection)[0, 0] += 1e-3
    seen.add(model.fingerprint)
    with torch.no_grad():
        next(model.image.parameters()).view(-1)[0] += 1e-3
    seen.add(model.fingerprint)
    model.preprocess = Preprocess(size=16, resize="squash")
    model._fingerprint = Fingerprint()
    seen.add(model.fingerprint)
    model.tokenizer = build_tokenizer({"name": "clip", "context_length": 23})
    model._fingerprint = Fingerprint()
    seen.add(model.fingerprint)
    assert len(seen) == 5
    assert all(len(digest) == 64 for digest in seen)


def test_fingerprint_follows_an_optimizer_step(model: DualEncoder) -> None:
    before = model.fingerprint
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(1, 3, 16, 16), model.tokenizer.encode(["a"]))[0].sum().backward()
    optimizer.step()
    assert model.fingerprint != before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": {"name": "cnn", "colour": 3}}, ConfigError, "colour: unknown key"),
        ({"image": {"name": "resnet"}}, NotFoundError, "unknown image tower 'resnet'.*known: cnn, timm"),
        ({"text": {}}, ConfigError, "text tower: name is missing; known: transformer"),
        ({"text": {"name": "bert"}}, NotFoundError, "unknown text tower 'bert'"),
        ({"dim": None}, ConfigError, "towers have widths 16 and 24"),
        ({"preprocess": Preprocess(size=18)}, ConfigError, "18 is not a multiple"),
        ({"tokenizer": {"name": "words"}}, NotFoundError, "unknown tokenizer"),
    ],
)
def test_wrong_configurations_say_what_and_where(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(CONFIG.model_copy(update=change))


def test_towers_of_equal_width_need_no_projection() -> None:
    text = {"name": "transformer", "width": 16, "layers": 1, "heads": 2}
    model = build_model(CONFIG.model_copy(update={"dim": None, "text": text}))
    assert model.dim == 16
    assert isinstance(model.image_projection, torch.nn.Identity)
