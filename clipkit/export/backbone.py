"""A tower in the names of another library: which tower can go where, its weights there, and the proof.

timm's plain ResNets and torchvision's have the same layers under the same names, so nothing is converted: the
weights are given the target's names, its own module is built from them, and the export is refused unless that
module gives the same features. Vision transformers and all others go to timm alone, where they come from.

A small stem (a 3×3 convolution of stride 1, no pooling) is neither library's own: the names stay, and whoever
loads the weights replaces the stem first, as the card says. Who does not is told by the shape of the first
convolution. Deep stems have one shape at any stride, so that nobody would be told: they are refused.

Shapes: N pictures, S pixels a side, D features.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipkit.errors import ArtifactError, InputError
from clipkit.images import Preprocess
from clipkit.models import Encoder
from clipkit.models.towers import TimmImage

Target = Literal["timm", "torchvision", "detection"]
TARGETS: tuple[Target, ...] = ("timm", "torchvision", "detection")

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
"""What timm and torchvision build alike, under one name."""

BODY = "body."
"""Where a detector's backbone (torchvision's `BackboneWithFPN`) keeps the network below the pyramid."""

TOLERANCE = {"timm": 1e-6, "torchvision": 1e-5, "detection": 1e-5}
"""Largest difference of a feature, as a share of the largest feature."""


@dataclass(frozen=True)
class Backbone:
    """An image tower that other libraries know.

    Args:
        tower: timm's model in its wrapper.
        architecture: timm's name without the tag.
        preprocess: What it wants to see.
        stem: Channels of a small stem; None for the architecture's own.
    """

    tower: TimmImage
    architecture: str
    preprocess: Preprocess
    stem: int | None

    @property
    def trunk(self) -> Any:
        """timm's model."""
        return self.tower.trunk

    def state(self, target: Target) -> dict[str, Tensor]:
        """The weights under the target's names, on the CPU.

        `detection` has no `num_batches_tracked`, as torchvision's `FrozenBatchNorm2d` has none.
        """
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.trunk.state_dict().items()}
        if target != "detection":
            return state
        return {BODY + key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def backbone_of(encoder: Encoder, target: Target) -> Backbone:
    """The encoder's tower, if the target can have it.

    Raises:
        InputError: It is no image tower of timm, or not of an architecture that the target has, or has a
            small deep stem.
    """
    name = encoder.config.tower.get("name")
    if encoder.modality != "image" or not isinstance(encoder.tower, TimmImage):
        picture = encoder.modality == "image"
        raise InputError(
            f"only image towers of timm can be exported; this one is the {encoder.modality} tower {name!r}",
            hint="--model.tower '{name: timm, model: resnet18}' trains one" if picture else None,
        )
    options = encoder.config.tower
    architecture = str(options["model"]).split(".")[0]
    if target != "timm" and architecture not in RESNETS:
        raise InputError(
            f"torchvision has no {architecture!r} with timm's layers",
            hint=f"export it --to timm; to torchvision and detection go {', '.join(RESNETS)}",
        )
    stem = _small_stem(encoder.tower.trunk, architecture) if options.get("small_stem") else None
    return Backbone(encoder.tower, architecture, encoder.preprocess, stem)


def _small_stem(trunk: nn.Module, architecture: str) -> int:
    """Channels of a stem of one convolution. Raises: InputError for one of several."""
    conv1 = trunk.get_submodule("conv1")
    if not isinstance(conv1, nn.Conv2d):
        raise InputError(
            f"{architecture} with a small stem cannot be exported: its weights also load into the usual "
            "stem, without a word, and then give other features",
            hint="small stems of one convolution can, for example resnet18's",
        )
    return conv1.out_channels


def rebuild(backbone: Backbone, target: Target, state: dict[str, Tensor]) -> nn.Module:
    """What a reader of the card builds: the target's own module with the weights, pictures to features.

    Raises:
        ArtifactError: The weights do not fit it.
    """
    try:
        if target == "timm":
            return _timm(backbone, state)
        return _torchvision(backbone, state) if target == "torchvision" else _detection(backbone, state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"{backbone.architecture} does not fit {target}: {reason}") from error


def _timm(backbone: Backbone, state: dict[str, Tensor]) -> nn.Module:
    import timm

    model = timm.create_model(backbone.architecture, num_classes=0, **timm_options(backbone))
    replace_stem(model, backbone.stem)
    model.load_state_dict(state)
    return model


def timm_options(backbone: Backbone) -> dict[str, Any]:
    """What timm must be told besides the name: the size of pictures, where the weights depend on it."""
    fixed = backbone.trunk.pretrained_cfg.get("fixed_input_size")
    return {"img_size": backbone.preprocess.size} if fixed else {}


def _torchvision(backbone: Backbone, state: dict[str, Tensor]) -> nn.Module:
    from torchvision import models

    model = models.get_model(backbone.architecture, weights=None)
    replace_stem(model, backbone.stem)
    model.fc = nn.Identity()
    model.load_state_dict(state)
    return model


def _detection(backbone: Backbone, state: dict[str, Tensor]) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    with_pyramid = resnet_fpn_backbone(backbone_name=backbone.architecture, weights=None, trainable_layers=5)
    replace_stem(with_pyramid.body, backbone.stem)
    # The pyramid is a detector's own and has no weights here.
    with_pyramid.body.load_state_dict({key.removeprefix(BODY): value for key, value in state.items()})
    return _LastMap(with_pyramid.body)


def replace_stem(model: nn.Module, channels: int | None) -> None:
    """Give a ResNet the stem for small pictures, in place; None leaves it."""
    if channels is not None:
        model.conv1 = nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()


class _LastMap(nn.Module):
    """The mean over the last map of a detector's body: what a ResNet's pooled features are."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        return list(self.body(pixels_N3SS).values())[-1].mean((2, 3))


@torch.no_grad()
def largest_difference(backbone: Backbone, target: Target, rebuilt: nn.Module) -> float:
    """Largest difference of a feature on two pictures of noise, as a share of the largest feature.

    Raises:
        ArtifactError: It is more than the target's tolerance.
    """
    side = backbone.preprocess.size
    pixels_23SS = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    tower = backbone.tower.cpu()
    was_training = tower.training
    ours_2D, theirs_2D = tower.eval()(pixels_23SS), rebuilt.eval()(pixels_23SS)
    tower.train(was_training)
    difference = float((ours_2D - theirs_2D).abs().max() / ours_2D.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE[target]:  # also where it is NaN
        raise ArtifactError(
            f"{target}'s {backbone.architecture} gives other features with these weights: "
            f"{difference:.2g} of the largest",
            hint="the versions of the two libraries may build it differently",
        )
    return difference
