"""The stem for small pictures: a ResNet of timm keeps the picture's size up to its first stage."""

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from clipkit.errors import ConfigError
from clipkit.images import Preprocess
from clipkit.models import Encoder, EncoderConfig, build_model, load_encoder, save_model


def encoder(model: str, **options: object) -> Encoder:
    tower = {"name": "timm", "model": model, **options}
    return build_model(EncoderConfig(tower=tower, preprocess=Preprocess(size=32)), seed=0)


def side_of_first_stage(model: Encoder) -> int:
    """Of the map that the first stage sees."""
    sizes: list[int] = []
    stage = model.tower.get_submodule("trunk.layer1")
    stage.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    model.eval().encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    return sizes[0]


@pytest.mark.parametrize("model", ["resnet18", "test_resnet", "seresnet18"])
def test_the_first_stage_of_a_resnet_sees_the_whole_map(model: str) -> None:
    assert side_of_first_stage(encoder(model)) == 8
    assert side_of_first_stage(encoder(model, small_stem=True)) == 32


def test_the_new_convolution_is_drawn_as_timm_draws_its_own() -> None:
    conv = encoder("resnet18", small_stem=True).tower.get_submodule("trunk.conv1")
    assert isinstance(conv, nn.Conv2d)
    assert conv.weight.shape == (64, 3, 3, 3)
    assert conv.bias is None
    assert float(conv.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_a_small_stem_is_saved_with_the_model(tmp_path: Path) -> None:
    model = encoder("test_resnet", small_stem=True).eval()
    save_model(model, tmp_path / "model")
    loaded = load_encoder(str(tmp_path / "model"))
    assert loaded.config.tower == {
        "name": "timm", "model": "test_resnet", "pretrained": False, "drop_path": 0.0, "small_stem": True,
    }  # fmt: skip
    pictures: Tensor = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded.encode(pictures), model.encode(pictures))


@pytest.mark.parametrize("model", ["test_vit", "test_convnext"])
def test_a_model_that_is_no_resnet_has_no_small_stem(model: str) -> None:
    assert timm.is_model(model)
    with pytest.raises(ConfigError, match=f"small_stem: timm's '{model}' is no ResNet"):
        encoder(model, small_stem=True)
