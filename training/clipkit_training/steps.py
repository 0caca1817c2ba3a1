"""Steps: what a method does with one batch. Each is a small module around the model that returns its loss.

A Step's `forward` is what DistributedDataParallel wraps. Losses gather over the group and return W times
this rank's share, so that DDP's mean over ranks is the gradient of one process with the whole batch.
"""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ConfigError
from clipkit.losses import contrast
from clipkit.models import DualEncoder
from clipkit.registry import Registry, Spec


class Step(Protocol):
    """One batch to a scalar loss and the numbers worth logging (scalars over the whole group)."""

    def __call__(self, images: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


class PairStep(nn.Module):
    """Image-text pairs against the whole global batch, with the softmax (CLIP) or sigmoid (SigLIP) loss.

    Args:
        model: Encodes both sides.
        link: "softmax", both directions (Radford et al. 2021), or "logistic" (Zhai et al. 2023).
        group: Processes whose batches are candidates too.
    """

    def __init__(self, model: DualEncoder, link: str, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.model = model
        self.link = link
        self.group = group

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of uint8 or normalised pictures (N, 3, S, S) with token ids (N, L)."""
        image_ND, text_ND, scale, bias = self.model(images, ids)
        if self.link == "logistic":
            assert bias is not None
            output = contrast(image_ND, text_ND, scale=scale, bias=bias, link="logistic", group=self.group)
        else:
            output = contrast(image_ND, text_ND, scale=scale, direction="both", group=self.group)
        assert output.accuracy is not None
        return output.loss, {
            "loss": output.value,
            "accuracy": output.accuracy,
            "positive_similarity": output.positive_similarity,
            "negative_similarity": output.negative_similarity,
        }


def build_clip(model: DualEncoder, group: dist.ProcessGroup | None) -> PairStep:
    """CLIP's symmetric cross-entropy."""
    if model.scoring != "softmax":
        raise ConfigError("step: clip needs model.scoring: softmax", hint="or use step: siglip")
    return PairStep(model, "softmax", group)


def build_siglip(model: DualEncoder, group: dist.ProcessGroup | None) -> PairStep:
    """SigLIP's pairwise sigmoid loss."""
    if model.scoring != "sigmoid" or model.bias is None:
        raise ConfigError("step: siglip needs model.scoring: sigmoid", hint="or use step: clip")
    return PairStep(model, "logistic", group)


STEPS = Registry(
    "step",
    (Spec("clip", Config, build_clip), Spec("siglip", Config, build_siglip)),
    group="clipkit.steps",
)
