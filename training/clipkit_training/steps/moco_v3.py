"""MoCo v3: each view's prediction must find the twin's projection of the other view among the batch's.

The one idea: MoCo's keys without its queue. The batch is large enough to be the negatives, of all processes
and as keys without a gradient; a predictor as BYOL's stands before the queries. The twin starts as a copy,
has BatchNorm statistics of its own, and moves after the optimizer's step, as in the paper's algorithm 1 (in
the authors' code at the next step's start, before the keys, which are the same keys). Each view goes through
the networks by itself.

Shapes: N rows of this rank, D dimensions of an embedding.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ConfigError
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import moco_v3_predictor, moco_v3_projector
from clipkit.state import Ema, cosine_decay
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.images import image_encoder, view_pairs


class MocoV3Config(Config):
    """Options of `moco_v3`.

    Args:
        temperature: τ of the logits cosine / τ; the authors have 1 for ResNet-50, 0.2 for ViT.
        momentum: The twin's decay in the first step, rising to 1 along half a cosine over the run; the
            authors have 0.996 for 1000 epochs.
        layers: Linear layers of the projector: 2 for a ResNet, 3 for a ViT.
        hidden: Width of the hidden layers of projector and predictor; 4096 in the paper.
        dim: D, width of their outputs.
        predictor_norm: BatchNorm after the predictor's last layer; the authors have it for ViT alone.
        freeze_patches: Leave a ViT's patch embedding as it was drawn, for stability; timm's ViTs only.
        sync_batch_norm: BatchNorm takes the statistics of all processes.
    """

    temperature: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.99, ge=0, le=1)
    layers: int = Field(default=2, ge=1)
    hidden: int = Field(default=1024, ge=1)
    dim: int = Field(default=256, ge=1)
    predictor_norm: bool = False
    freeze_patches: bool = False
    sync_batch_norm: bool = True


class MocoV3Step(Step):
    """Cross-entropy of each view's queries among the keys of the other, times 2τ, summed.

        L = 2τ (mean_i −log softmax_j(cos(q_i1, k_j2) / τ)_i + mean_i −log softmax_j(cos(q_i2, k_j1) / τ)_i)

    Args:
        model: The backbone; its BatchNorm layers are changed in place.
        config: The options.
        setting: The run; its length must be known.

    Raises:
        ConfigError: It is not known, there is one training sample alone, or no patch embedding to freeze.

    References:
        Chen, Xie and He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers", algorithm
        1; section 4 for the frozen patch embedding.
    """

    model: Encoder

    def __init__(self, model: Encoder, config: MocoV3Config, setting: Setting) -> None:
        super().__init__()
        setting.need_negatives()
        self.temperature, self.group = config.temperature, setting.group
        over = setting.group if config.sync_batch_norm else None
        sizes = {"hidden": config.hidden, "dim": config.dim}
        if config.freeze_patches:
            _freeze_patches(model)
        self.model = synchronised(model, over)
        self.projector = synchronised(moco_v3_projector(model.dim, layers=config.layers, **sizes), over)
        predictor = moco_v3_predictor(config.dim, hidden=config.hidden, last_norm=config.predictor_norm)
        self.predictor = synchronised(predictor, over)
        decay = cosine_decay(config.momentum, setting.need_steps("the twin's momentum"))
        self.twin = Ema(self._encoder(), decay, buffers="own")

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's views."""
        views, encoder = view_pairs(batch), self._encoder()
        z1_ND, z2_ND = (encoder(view) for view in views)
        with torch.no_grad():
            key1_ND, key2_ND = (self.twin(view) for view in views)
        ids_N = batch.sample_ids.to(z1_ND.device)
        outputs = [
            contrast(self.predictor(z_ND), key_ND, q_id=ids_N, scale=1 / self.temperature, group=self.group)
            for z_ND, key_ND in ((z1_ND, key2_ND), (z2_ND, key1_ND))
        ]
        names = ("accuracy", "positive_similarity", "negative_similarity")
        figures = {name: torch.stack([getattr(out, name) for out in outputs]).mean() for name in names}
        factor = 2 * self.temperature
        return factor * (outputs[0].loss + outputs[1].loss), {
            "loss": factor * (outputs[0].value + outputs[1].value),
            **figures,
            **collapse_figures(z1_ND.detach()),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the twin towards the network."""
        self.twin.update(self._encoder())

    def _encoder(self) -> nn.Sequential:
        """Backbone and projector as one module; not kept, or the state dict would hold both twice."""
        return nn.Sequential(self.model, self.projector)


def _freeze_patches(model: Encoder) -> None:
    patches = getattr(getattr(model.tower, "trunk", None), "patch_embed", None)
    if not isinstance(patches, nn.Module):
        raise ConfigError(
            "step: freeze_patches needs a ViT of timm, the tower has no patch embedding",
            hint="leave freeze_patches out",
        )
    patches.requires_grad_(False)


def build_moco_v3(model: nn.Module, config: MocoV3Config, setting: Setting) -> MocoV3Step:
    """MoCo v3 around an encoder of pictures."""
    return MocoV3Step(image_encoder(model, "moco_v3"), config, setting)
