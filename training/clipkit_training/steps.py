"""Steps: what a method does with one batch. Each is a small module around the model that returns its loss.

A Step's `forward` is what DistributedDataParallel wraps. Losses gather over the group and return W times
this rank's share, so that DDP's mean over ranks is the gradient of one process with the whole batch.
"""

from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
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

    Pictures with the same caption, word for word, are positives of each other's captions. In the softmax
    loss that changes the accuracy alone: its value is the same when equal captions embed alike.

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
        caption_N = caption_ids(ids, self.model.tokenizer.pad_id)
        same: dict[str, Any] = {"q_id": caption_N, "k_id": caption_N, "scale": scale, "group": self.group}
        if self.link == "logistic":
            assert bias is not None
            output = contrast(image_ND, text_ND, bias=bias, link="logistic", **same)
        else:
            output = contrast(image_ND, text_ND, direction="both", **same)
        assert output.accuracy is not None
        return output.loss, {
            "loss": output.value,
            "accuracy": output.accuracy,
            "positive_similarity": output.positive_similarity,
            "negative_similarity": output.negative_similarity,
        }


def caption_ids(ids_NL: Tensor, pad_id: int) -> Tensor:
    """One int64 id per caption, (N,): equal for equal token ids (N, L), however much padding follows.

    The id is a sum of products modulo 2^64, so different captions share one with a probability near 2^-64.
    """
    factor_L = _factors(ids_NL.shape[1]).to(ids_NL.device)
    return (ids_NL.masked_fill(ids_NL == pad_id, 0) * factor_L).sum(dim=1)


@cache
def _factors(length: int) -> Tensor:
    """`length` fixed random odd factors (the first ones are the same for any length), int64."""
    numbers = np.random.Generator(np.random.Philox(0)).integers(0, 2**63, size=length, dtype=np.int64)
    return torch.from_numpy(numbers | 1)


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
