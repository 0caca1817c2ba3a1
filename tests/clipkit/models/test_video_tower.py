"""The tower for clips: pooling against plain loops, order that counts or does not, and the model folder."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import ConfigError, InputError, NotFoundError
from clipkit.images import Preprocess
from clipkit.models import DualEncoder, EncoderConfig, ModelConfig, build_model, load_model, save_model
from clipkit.models.towers_video import FrameAttention, Frames, FramesConfig

CNN = {"name": "cnn", "widths": [8, 16], "depths": [0, 1], "stem": 4}
TEXT = {"name": "transformer", "width": 16, "layers": 1, "heads": 2}
POOLS = ("mean", "attention")
FRAMES = 5


def config(pool: str = "attention", **changes: Any) -> ModelConfig:
    image = {"name": "frames", "image": CNN, "pool": pool, "frames": FRAMES, **changes}
    return ModelConfig(image=image, text=TEXT, dim=12, preprocess=Preprocess(size=16))


def clips(count: int = 3, frames: int = FRAMES) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, frames, 3, 16, 16), dtype=torch.uint8, generator=generator)


def tower_of(model: DualEncoder) -> Frames:
    assert isinstance(model.image, Frames)
    return model.image


def test_mean_pooling_is_the_mean_over_each_clips_frames() -> None:
    model = build_model(config("mean"), seed=0).eval()
    tower, pixels = tower_of(model), clips()
    rows = []
    for clip in pixels:
        features = [tower.image(model.preprocess.normalize(frame[None]))[0] for frame in clip]
        rows.append(F.normalize(model.image_projection(sum(features) / FRAMES), dim=0))
    torch.testing.assert_close(model.encode_image(pixels), torch.stack(rows))
    assert tower.width == 16


def naive_attention(pool: FrameAttention, features_FD: Tensor) -> Tensor:
    """One clip through one block, head by head and frame by frame, in float64."""
    (block,) = pool.blocks
    assert isinstance(block, nn.TransformerEncoderLayer)
    weight, bias = block.self_attn.in_proj_weight, block.self_attn.in_proj_bias
    width, heads = features_FD.shape[1], block.self_attn.num_heads
    x_FD = features_FD + pool.place_FD
    q_FD, k_FD, v_FD = (block.norm1(x_FD) @ weight.T + bias).split(width, dim=1)
    seen = torch.zeros_like(x_FD)
    for part in torch.arange(width).chunk(heads):
        for frame in range(len(x_FD)):
            scores = torch.stack([q_FD[frame, part] @ key for key in k_FD[:, part]]) / math.sqrt(len(part))
            seen[frame, part] = sum(w * v for w, v in zip(scores.softmax(0), v_FD[:, part], strict=True))
    x_FD = x_FD + block.self_attn.out_proj(seen)
    x_FD = x_FD + block.linear2(F.gelu(block.linear1(block.norm2(x_FD))))
    return (features_FD + x_FD).mean(dim=0)


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_what_a_plain_loop_gives(training: bool) -> None:
    torch.manual_seed(0)
    pool = FrameAttention(12, FRAMES, layers=1, heads=3).double().train(training)
    features_NFD = torch.randn(4, FRAMES, 12, dtype=torch.float64)
    expected = torch.stack([naive_attention(pool, clip) for clip in features_NFD])
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(pool(features_NFD), expected)


def test_the_mean_is_blind_to_the_order_of_frames_and_attention_is_not() -> None:
    pixels = clips()
    backwards = pixels.flip(1)
    mean, attention = (build_model(config(pool), seed=0).eval() for pool in POOLS)
    torch.testing.assert_close(mean.encode_image(pixels), mean.encode_image(backwards))
    far = (attention.encode_image(pixels) - attention.encode_image(backwards)).norm(dim=1)
    assert bool((far > 1e-3).all())


@pytest.mark.parametrize("pool", POOLS)
def test_a_picture_is_a_clip_that_stands_still(pool: str) -> None:
    model = build_model(config(pool), seed=0).eval()
    pictures = clips()[:, 0]
    still = pictures[:, None].expand(-1, FRAMES, -1, -1, -1)
    torch.testing.assert_close(model.encode_image(pictures), model.encode_image(still))


@pytest.mark.parametrize("pool", POOLS)
def test_a_clip_is_embedded_the_same_in_any_batch(pool: str) -> None:
    model, pixels = build_model(config(pool), seed=0).eval(), clips(4)
    alone = torch.cat([model.encode_image(clip[None]) for clip in pixels])
    torch.testing.assert_close(model.encode_image(pixels), alone)
    normalised = model.preprocess.normalize(pixels)
    torch.testing.assert_close(model.encode_image(normalised), alone)


@pytest.mark.parametrize("pool", POOLS)
def test_gradients_reach_every_parameter_and_every_frame(pool: str) -> None:
    model = build_model(config(pool, layers=2), seed=0)
    pixels = model.preprocess.normalize(clips()).requires_grad_()
    (model.encode_image(pixels) * torch.randn(3, 12)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.image.parameters())
    assert pixels.grad is not None
    assert bool((pixels.grad.abs().flatten(2).sum(dim=2) > 0).all())


@pytest.mark.parametrize("pool", POOLS)
def test_a_saved_model_of_clips_is_the_same_again(pool: str, tmp_path: Path) -> None:
    model = build_model(config(pool), seed=0).eval()
    assert model.config.image["image"] == {**CNN, "groups": 8, "norm": "group"}
    assert model.config.image["layers"] == 1
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, DualEncoder)
    assert again.fingerprint == model.fingerprint
    assert torch.equal(again.encode_image(clips()), model.encode_image(clips()))


def test_any_image_tower_can_see_the_frames_also_in_an_encoder() -> None:
    options = {"name": "frames", "image": {"name": "timm", "model": "test_vit"}, "frames": 2}
    encoder = build_model(EncoderConfig(tower=options, preprocess=Preprocess(size=16)), seed=0)
    assert encoder.encode(clips(frames=2)).shape == (3, encoder.dim)


class Projecting(nn.Module):
    """A tower that ends in a projection into a shared space."""

    width, projects = 4, True

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        return pixels_N3SS.flatten(1)[:, :4]


def test_a_mean_of_projections_is_a_projection_and_attention_is_none() -> None:
    found = [Frames(Projecting(), {}, FramesConfig(image={}, pool=pool)).projects for pool in POOLS]
    assert found == [True, False]


def test_what_does_not_fit_is_refused() -> None:
    model = build_model(config(), seed=0)
    with pytest.raises(InputError, match="takes clips of 5 frames, got 4"):
        model.encode_image(clips(frames=4))
    with pytest.raises(ConfigError, match="the features' width 16 is not a multiple of 3"):
        build_model(config(heads=3))
    with pytest.raises(NotFoundError, match="cnnn"):
        build_model(config(image={"name": "cnnn"}))
    with pytest.raises(ConfigError, match="widths"):
        build_model(config(image=CNN | {"widths": [9]}))
