"""Image-text pairs: CLIP and SigLIP.

The one idea: pictures with the same caption, word for word, are positives of each other's captions.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ConfigError
from clipkit.losses import contrast
from clipkit.models import DualEncoder
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step


class PairStep(Step):
    """Image-text pairs against the whole global batch, with the softmax (CLIP) or sigmoid (SigLIP) loss.

    Equal captions change the accuracy alone in the softmax loss: its value is the same when they embed alike.

    Args:
        model: Encodes both sides.
        link: "softmax", both directions (Radford et al. 2021), or "logistic" (Zhai et al. 2023).
        group: Processes whose batches are candidates too.
    """

    model: DualEncoder

    def __init__(self, model: DualEncoder, link: str, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.model = model
        self.link = link
        self.group = group

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's pictures with its captions."""
        image_ND, text_ND, scale, bias = self.model(batch.images, batch.ids)
        caption_N = caption_ids(batch.ids, self.model.tokenizer.pad_id)
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
            "scale": scale.detach(),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the logit scale in its range."""
        self.model.clamp_scale_()


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


def build_clip(model: nn.Module, config: Config, setting: Setting) -> PairStep:
    """CLIP's symmetric cross-entropy."""
    model = _dual(model, "clip", setting)
    if model.scoring != "softmax":
        raise ConfigError("step: clip needs model.scoring: softmax", hint="or use step: siglip")
    return PairStep(model, "softmax", setting.group)


def build_siglip(model: nn.Module, config: Config, setting: Setting) -> PairStep:
    """SigLIP's pairwise sigmoid loss."""
    model = _dual(model, "siglip", setting)
    if model.scoring != "sigmoid" or model.bias is None:
        raise ConfigError("step: siglip needs model.scoring: sigmoid", hint="or use step: clip")
    return PairStep(model, "logistic", setting.group)


def _dual(model: nn.Module, step: str, setting: Setting) -> DualEncoder:
    if not isinstance(model, DualEncoder):
        raise ConfigError(f"step: {step} trains pictures with texts, the model has one tower")
    setting.need_negatives()
    return model
