"""Projection heads and predictors: the small MLPs between features and a contrastive loss, exact per paper.

The one idea: all of them are `mlp_head`, a chain of linear layers with ReLU between them, and differ in where
BatchNorm stands, what it learns, and which layers have a bias. A head is used in training alone; what is kept
is the model in front of it. Weights are drawn as torch draws those of `nn.Linear`.

Every head maps (N, first width) to (N, last width), floating.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from clipkit.errors import InputError

LastNorm = Literal["none", "plain", "scale", "affine"]
SimCLRHead = Literal["v1", "v2", "linear", "none"]


def mlp_head(
    widths: Sequence[int],
    *,
    batch_norm: bool,
    last_norm: LastNorm = "none",
    bias: bool = True,
    last_bias: bool = True,
) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        widths: Of the input, of each hidden layer, and of the output; one alone is the identity.
        batch_norm: Whether BatchNorm, which learns scale and shift, stands before every ReLU.
        last_norm: BatchNorm after the last layer: "none"; "plain", which learns nothing; "scale", which
            learns a scale but no shift; "affine", which learns both.
        bias: Whether the hidden layers have a bias.
        last_bias: Whether the last layer has one.

    Raises:
        InputError: A width is below 1, or there is none.
    """
    if not widths or min(widths) < 1:
        raise InputError(f"widths of a head must be integers >= 1, got {tuple(widths)}")
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths), start=1):
        if number < len(widths) - 1:
            norm = [nn.BatchNorm1d(after)] if batch_norm else []
            layers += [nn.Linear(before, after, bias=bias), *norm, nn.ReLU(inplace=True)]
        else:
            layers += [nn.Linear(before, after, bias=last_bias), *_last(after, last_norm)]
    return nn.Sequential(*layers)


def _last(width: int, kind: LastNorm) -> list[nn.Module]:
    if kind == "none":
        return []
    norm = nn.BatchNorm1d(width, affine=kind != "plain")
    if kind == "scale":
        norm.register_parameter("bias", None)
    return [norm]


def simclr_head(
    width: int, kind: SimCLRHead = "v1", *, hidden: int | None = None, dim: int = 128
) -> nn.Sequential:
    """SimCLR's projection head.

    Linear layers without bias, BatchNorm after each; the last one learns no shift.

    Args:
        width: Of the features.
        kind: "v1" with one hidden layer, "v2" with two, "linear" with none; "none" leaves the features alone.
        hidden: Width of the hidden layers; None: of the features.
        dim: Width of the output.

    References:
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", section 4.2
        (v1, "linear", "none"), and "Big Self-Supervised Models are Strong Semi-Supervised Learners", section
        2 (v2); BatchNorm as in the authors' code.
    """
    if kind == "none":
        return mlp_head([width], batch_norm=False)
    layers = {"linear": 0, "v1": 1, "v2": 2}[kind]
    return mlp_head(
        [width, *[hidden or width] * layers, dim],
        batch_norm=True,
        last_norm="scale",
        bias=False,
        last_bias=False,
    )


def sup_con_head(width: int, *, hidden: int | None = None, dim: int = 128) -> nn.Sequential:
    """SupCon's projection head: one hidden layer; biases, no BatchNorm.

    Args:
        width: Of the features.
        hidden: Width of the hidden layer; None: of the features.
        dim: Width of the output.

    References:
        Khosla et al. 2020, "Supervised Contrastive Learning", section 3.1, and the authors' code.
    """
    return mlp_head([width, hidden or width, dim], batch_norm=False)


def moco_head(
    width: int, kind: Literal["v1", "v2"], *, hidden: int | None = None, dim: int = 128
) -> nn.Sequential:
    """MoCo's head: one linear layer (v1), or one hidden layer (v2); biases, no BatchNorm.

    Args:
        width: Of the features.
        kind: "v1" or "v2".
        hidden: Width of v2's hidden layer; None: of the features.
        dim: Width of the output.

    References:
        He et al. 2020, "Momentum Contrast", section 3.3; Chen et al. 2020, "Improved Baselines with Momentum
        Contrastive Learning", section 2.
    """
    widths = [width, dim] if kind == "v1" else [width, hidden or width, dim]
    return mlp_head(widths, batch_norm=False)


def moco_v3_projector(width: int, *, hidden: int = 4096, dim: int = 256, layers: int = 2) -> nn.Sequential:
    """MoCo v3's projector: no biases, BatchNorm after each layer; the last one learns nothing.

    Args:
        width: Of the features.
        hidden: Width of the hidden layers.
        dim: Width of the output.
        layers: Linear layers: 2 for a ResNet, 3 for a ViT.

    References:
        Chen, Xie and He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", section
        4 (MLP heads), and the authors' code (the last BatchNorm).
    """
    return mlp_head(
        [width, *[hidden] * (layers - 1), dim],
        batch_norm=True,
        last_norm="plain",
        bias=False,
        last_bias=False,
    )


def moco_v3_predictor(dim: int, *, hidden: int = 4096, last_norm: bool = True) -> nn.Sequential:
    """MoCo v3's predictor: one hidden layer, no biases.

    Args:
        dim: Width of input and output.
        hidden: Width of the hidden layer.
        last_norm: BatchNorm that learns nothing after the last layer; the published ResNet runs have none.

    References:
        As `moco_v3_projector`.
    """
    norm: LastNorm = "plain" if last_norm else "none"
    return mlp_head([dim, hidden, dim], batch_norm=True, last_norm=norm, bias=False, last_bias=False)


def byol_head(width: int, *, hidden: int = 4096, dim: int = 256) -> nn.Sequential:
    """BYOL's MLP, both its projector and its predictor: Linear, BatchNorm, ReLU, Linear without bias.

    Args:
        width: Of the input.
        hidden: Width of the hidden layer.
        dim: Width of the output.

    References:
        Grill et al. 2020, "Bootstrap Your Own Latent", section 3.3; the biases as in the authors' code.
    """
    return mlp_head([width, hidden, dim], batch_norm=True, last_bias=False)


def simsiam_projector(
    width: int, *, hidden: int | None = None, dim: int = 2048, layers: int = 3
) -> nn.Sequential:
    """SimSiam's projector: no biases, BatchNorm after each layer; the last one learns nothing.

    Args:
        width: Of the features.
        hidden: Width of the hidden layers; None: of the features.
        dim: Width of the output.
        layers: Linear layers: 3, and 2 in the paper's CIFAR-10 runs.

    References:
        Chen and He 2021, "Exploring Simple Siamese Representation Learning", section 3 and appendix D; the
        last BatchNorm as in the authors' code.
    """
    return mlp_head(
        [width, *[hidden or width] * (layers - 1), dim],
        batch_norm=True,
        last_norm="plain",
        bias=False,
        last_bias=False,
    )


def simsiam_predictor(dim: int, *, hidden: int | None = None) -> nn.Sequential:
    """SimSiam's predictor, a bottleneck: no BatchNorm after the last layer, which has a bias.

    Args:
        dim: Width of input and output.
        hidden: Width of the hidden layer; None: a quarter of `dim`.

    References:
        Chen and He 2021, "Exploring Simple Siamese Representation Learning", section 3 and table 3.
    """
    return mlp_head([dim, hidden or max(1, dim // 4), dim], batch_norm=True, bias=False)
