"""Exported backbones, loaded by the libraries they are for: the same features, and a detector that trains."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torchvision import models
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from clipkit.cli import parser_for
from clipkit.cli.export import TARGETS as OFFERED
from clipkit.cli.export import command
from clipkit.errors import ArtifactError, InputError
from clipkit.export import TARGETS, Target, export_backbone
from clipkit.files import read_manifest
from clipkit.images import Preprocess
from clipkit.models import Encoder, EncoderConfig, ModelConfig, build_model, save_model, seeded

LOOK = Preprocess(
    size=64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), interpolation="bilinear", resize_size=80
)
SMALL = LOOK.model_copy(update={"size": 32, "resize_size": None})


def encoder_of(model: str, look: Preprocess = LOOK, **options: Any) -> Encoder:
    """An encoder whose batch normalisation has seen pictures, and has gains as after training."""
    tower = {"name": "timm", "model": model, **options}
    encoder = build_model(EncoderConfig(tower=tower, preprocess=look), seed=0)
    with torch.no_grad(), seeded(0):
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
        encoder.train()(noise(8, look.size))
    return encoder.eval()


def noise(count: int, side: int) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet18() -> Encoder:
    return encoder_of("resnet18")


def difference(encoder: Encoder, theirs: nn.Module) -> float:
    """Of features, as a share of the largest."""
    pixels = noise(4, encoder.preprocess.size)
    with torch.no_grad():
        ours = encoder.encode(pixels)
        return float((ours - theirs.eval()(pixels)).abs().max() / ours.abs().max())


def built_by_the_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the card's code leaves when it runs in the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_timm_loads_the_folder_with_the_same_features(resnet18: Encoder, tmp_path: Path) -> None:
    report = export_backbone(resnet18, "timm", tmp_path / "out")
    assert report["difference"] <= 1e-6
    theirs = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert difference(resnet18, theirs) <= 1e-6
    file = str(tmp_path / "out/model.safetensors")
    assert difference(resnet18, timm.create_model("resnet18", num_classes=0, checkpoint_path=file)) <= 1e-6


@pytest.mark.parametrize(
    "look",
    [LOOK, LOOK.model_copy(update={"resize": "squash", "resize_size": None, "interpolation": "bicubic"})],
)
def test_timm_prepares_pictures_as_the_encoder_does(look: Preprocess, tmp_path: Path) -> None:
    encoder = encoder_of("resnet18", look)
    export_backbone(encoder, "timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    picture = Image.effect_noise((120, 90), 80).convert("RGB")
    transform: Any = create_transform(**resolve_data_config({}, model=theirs))
    torch.testing.assert_close(transform(picture)[None], encoder.preprocess([picture]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto", "resnet18d"])
def test_other_towers_go_to_timm_alone(model: str, tmp_path: Path) -> None:
    encoder = encoder_of(model)
    export_backbone(encoder, "timm", tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert difference(encoder, theirs) <= 1e-6
    for target in ("torchvision", "detection"):
        with pytest.raises(InputError, match=f"torchvision has no '{model}'") as refused:
            export_backbone(encoder, target, tmp_path / "no")
        assert "--to timm" in str(refused.value)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("model", ["resnet50", "resnext50_32x4d"])
def test_torchvision_loads_every_weight_with_the_same_features(model: str, tmp_path: Path) -> None:
    encoder = encoder_of(model)
    export_backbone(encoder, "torchvision", tmp_path / "out.safetensors")
    theirs: Any = models.get_model(model, weights=None)
    theirs.fc = nn.Identity()
    theirs.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert difference(encoder, theirs) <= 1e-5


@pytest.mark.parametrize("small_stem", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_the_code_in_the_card_builds_the_model(
    target: Target, small_stem: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of("resnet18", SMALL, small_stem=small_stem)
    report = export_backbone(encoder, target, tmp_path / "out", source={"model": "runs/mine", "steps": 7})
    assert report["small_stem"] is small_stem
    names = built_by_the_card(tmp_path / "out", monkeypatch)
    if target == "detection":
        body = names["model"].backbone.body

        class Pooled(nn.Module):
            def forward(self, pixels: torch.Tensor) -> torch.Tensor:
                return body(pixels)["3"].mean((2, 3))

        assert difference(encoder, Pooled()) <= 1e-5
        assert names["model"].transform.image_mean == list(SMALL.mean)
        assert not body.conv1.weight.requires_grad, "trainable_layers=3 is layers 2 to 4"
    else:
        assert difference(encoder, names["model"]) <= 1e-5
    text = (tmp_path / "out/README.md").read_text()
    assert "| model | runs/mine |" in text
    assert encoder.fingerprint in text
    assert ("small pictures" in text) is small_stem


def test_a_small_stem_is_not_mistaken_for_the_usual_one(tmp_path: Path) -> None:
    encoder = encoder_of("resnet18", SMALL, small_stem=True)
    export_backbone(encoder, "torchvision", tmp_path / "out.safetensors")
    theirs: Any = models.get_model("resnet18", weights=None)
    theirs.fc = nn.Identity()
    with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
        theirs.load_state_dict(load_file(tmp_path / "out.safetensors"))
    with pytest.raises(InputError, match="resnet18d with a small stem cannot be exported"):
        export_backbone(encoder_of("resnet18d", SMALL, small_stem=True), "timm", tmp_path / "no")


@pytest.mark.parametrize("detector", [FasterRCNN, RetinaNet])
def test_a_detector_trains_on_the_exported_backbone(detector: Any, resnet18: Encoder, tmp_path: Path) -> None:
    export_backbone(resnet18, "detection", tmp_path / "out.safetensors")
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    loaded = backbone.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=False)
    assert loaded.unexpected_keys == []
    assert all(key.startswith("fpn.") for key in loaded.missing_keys)
    model = detector(
        backbone, num_classes=3, min_size=96, max_size=96, image_mean=LOOK.mean, image_std=LOOK.std
    )
    body: Any = model.backbone.body
    layer = body.layer4[0].conv1.weight
    before, frozen = layer.detach().clone(), body.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(0)
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([1])} for _ in range(2)]
    losses = model.train()(list(torch.rand(2, 3, 96, 96)), targets)
    loss = torch.stack(list(losses.values())).sum()
    assert torch.isfinite(loss)
    loss.backward()
    optimizer.step()
    assert layer.grad.abs().max() > 0
    assert not torch.equal(layer, before)
    assert torch.equal(body.conv1.weight, frozen)
    assert torch.equal(body.bn1.running_mean, resnet18.tower.trunk.bn1.running_mean), "frozen"  # pyright: ignore


def test_one_file_says_in_its_header_what_it_is(resnet18: Encoder, tmp_path: Path) -> None:
    export_backbone(resnet18, "torchvision", tmp_path / "out.safetensors", source={"model": "runs/mine"})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = json.loads(file.metadata()["clipkit"])
    assert header["architecture"] == "resnet18"
    assert header["fingerprint"] == resnet18.fingerprint
    assert header["preprocess"]["mean"] == list(LOOK.mean)
    assert header["source"] == {"model": "runs/mine"}


def test_the_folder_has_a_manifest_that_names_its_files(resnet18: Encoder, tmp_path: Path) -> None:
    export_backbone(resnet18, "torchvision", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out", "export")
    assert set(manifest["files"]) == {"model.safetensors", "config.json", "README.md"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["preprocess"]["std"] == list(LOOK.std)
    assert config["features"] == 512


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_nothing_is_overwritten(name: str, resnet18: Encoder, tmp_path: Path) -> None:
    export_backbone(resnet18, "timm", tmp_path / name)
    with pytest.raises(ArtifactError, match="already exists"):
        export_backbone(resnet18, "timm", tmp_path / name)


def test_weights_that_give_other_features_there_are_refused(tmp_path: Path) -> None:
    encoder = encoder_of("resnet18")
    trunk: Any = encoder.tower.trunk
    trunk.bn1.eps = 0.1  # in no state dict: torchvision's would stay at 1e-5
    with pytest.raises(ArtifactError, match="gives other features"):
        export_backbone(encoder, "torchvision", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_towers_that_are_not_of_timm_are_refused(tmp_path: Path) -> None:
    config = EncoderConfig(tower={"name": "cnn", "widths": (8, 16), "depths": (1, 1)}, preprocess=LOOK)
    with pytest.raises(InputError, match="the image tower 'cnn'"):
        export_backbone(build_model(config, seed=0), "timm", tmp_path / "out")


@pytest.mark.parametrize("named", ["model", "."], ids=["the model folder", "the run folder"])
def test_the_command_exports_the_image_tower_of_a_pair(
    named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(
        image={"name": "timm", "model": "resnet18"},
        text={"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        dim=8,
        preprocess=LOOK,
        tokenizer={"name": "clip", "context_length": 16},
    )
    model = build_model(config, seed=0).eval()
    save_model(model, tmp_path / "model", training={"step": "clip", "shards": ["0" * 16]})
    parser = parser_for(command, "clipkit export")
    out = tmp_path / "out"
    args = parser.parse_args([str(tmp_path / named), "--to", "timm", "--out", str(out), "--json"])
    assert command.run is not None
    assert not command.run(args)
    assert json.loads(capsys.readouterr().out)["features"] == 512
    pixels = noise(4, 64)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels), model.image(pixels), atol=1e-6, rtol=1e-6)
    assert read_manifest(out, "export")["source"] == {"model": str(tmp_path / named), "step": "clip"}


def test_the_command_offers_every_target() -> None:
    assert OFFERED == TARGETS
