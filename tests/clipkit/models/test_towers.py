"""timm towers, and the table that outsiders extend."""

import pytest
import torch
from torch import nn

from clipkit.config import Config
from clipkit.errors import ConfigError, NotFoundError
from clipkit.images import Preprocess
from clipkit.models import ModelConfig, build_model
from clipkit.models.towers import IMAGE_TOWERS, TEXT_TOWERS
from clipkit.registry import Registry, Spec

TEXT = {"name": "transformer", "width": 16, "layers": 1, "heads": 2}


def config(size: int, **image: object) -> ModelConfig:
    return ModelConfig(image=image, text=TEXT, dim=8, preprocess=Preprocess(size=size))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 32),
        ("test_convnext", 64),
        ("test_efficientnet", 48),
        ("mobilenetv4_conv_small_035", 64),
        ("resnet10t", 40),
    ],
)
def test_timm_models_of_any_size_with_their_true_width(name: str, size: int) -> None:
    model = build_model(config(size, name="timm", model=name), seed=0)
    features = model.image(torch.rand(2, 3, size, size))
    assert features.shape == (2, model.image.width)
    model.encode_image(torch.rand(2, 3, size, size)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.image.parameters())


def test_a_dry_run_leaves_training_mode_and_statistics_alone() -> None:
    model = build_model(config(40, name="timm", model="resnet10t"))
    assert model.training
    statistics = [b for name, b in model.image.named_buffers() if name.endswith("running_mean")]
    assert statistics
    assert all(torch.equal(mean, torch.zeros_like(mean)) for mean in statistics)


def test_unknown_and_unfitting_timm_models() -> None:
    with pytest.raises(NotFoundError, match=r"no model 'resnet51'.*near: .*resnet"):
        build_model(config(32, name="timm", model="resnet51"))
    with pytest.raises(ConfigError, match="cannot be built for pictures of 33 pixels"):
        build_model(config(33, name="timm", model="test_vit"))


class FlatConfig(Config):
    """A tower of an outsider."""

    width: int = 4


class Flat(nn.Module):
    def __init__(self, settings: FlatConfig, size: int) -> None:
        super().__init__()
        self.width = settings.width
        self.linear = nn.Linear(3 * size * size, settings.width)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.linear(pixels.flatten(1))


def test_an_outsiders_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (*IMAGE_TOWERS._table, Spec("flat", FlatConfig, Flat))
    monkeypatch.setattr("clipkit.models.build.IMAGE_TOWERS", Registry("image tower", table, group="none"))
    model = build_model(config(8, name="flat"))
    assert model.encode_image(torch.rand(1, 3, 8, 8)).shape == (1, 8)
    assert model.config.image == {"name": "flat", "width": 4}


def test_names_in_the_tables() -> None:
    assert IMAGE_TOWERS.names()[:4] == ["cnn", "timm", "open_clip", "hf"]
    assert TEXT_TOWERS.names()[:3] == ["transformer", "open_clip", "hf"]
