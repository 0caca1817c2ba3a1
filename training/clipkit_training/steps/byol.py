"""BYOL: predict what a slow twin of the network makes of the other view; no negatives at all.

The one idea: nothing in the loss forbids that all pictures embed alike. What keeps them apart is that the
twin gets no gradient, and that a predictor, which the twin has not, stands between the two; `predictor:
false` shows the collapse, and `embedding_std` tells it.

The twin starts as a copy of the network (the authors' code draws it anew), sees its own batches in train mode
with BatchNorm statistics of its own, and moves after the optimizer's step. Its decay is a function of the
steps so far alone. Each view goes through the networks by itself.

Shapes: N rows of this rank, D dimensions of a projection.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import byol_head
from clipkit.state import Ema, cosine_decay
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.images import image_encoder, view_pairs


class BYOLConfig(Config):
    """Options of `byol`.

    Args:
        momentum: The twin's decay in the first step, rising to 1 along half a cosine over the run; the
            authors have 0.996 for 1000 epochs of ImageNet, 0.99 for 100 and 300, 0.97 for 40.
        hidden: Width of the hidden layers of projector and predictor; 4096 in the paper.
        dim: D, width of their outputs.
        predictor: Whether there is one; without it the network collapses.
        sync_batch_norm: BatchNorm takes the statistics of all processes.
    """

    momentum: float = Field(default=0.996, ge=0, le=1)
    hidden: int = Field(default=1024, ge=1)
    dim: int = Field(default=256, ge=1)
    predictor: bool = True
    sync_batch_norm: bool = True


class BYOLStep(Step):
    """Both views predict the twin's projection of the other.

        L = mean_i (2 − 2 cos(p_i1, t_i2)) + (2 − 2 cos(p_i2, t_i1)),   p = predictor(z), t = the twin's z

    Args:
        model: The backbone; its BatchNorm layers are changed in place.
        config: The options.
        setting: The run; its length must be known.

    References:
        Grill et al. 2020, "Bootstrap Your Own Latent", section 3.1, eq. 2.
    """

    model: Encoder

    def __init__(self, model: Encoder, config: BYOLConfig, setting: Setting) -> None:
        super().__init__()
        self.group = setting.group
        over = setting.group if config.sync_batch_norm else None
        self.model = synchronised(model, over)
        self.projector = synchronised(byol_head(model.dim, hidden=config.hidden, dim=config.dim), over)
        predictor = byol_head(config.dim, hidden=config.hidden, dim=config.dim)
        self.predictor = synchronised(predictor, over) if config.predictor else nn.Identity()
        decay = cosine_decay(config.momentum, setting.need_steps("the twin's momentum"))
        self.target = Ema(self._online(), decay, buffers="own")

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's views."""
        views, online = view_pairs(batch), self._online()
        z1_ND, z2_ND = (online(view) for view in views)
        with torch.no_grad():
            target1_ND, target2_ND = (self.target(view) for view in views)
        outputs = [
            contrast(self.predictor(z_ND), target_ND, paired=True, link="align", group=self.group)
            for z_ND, target_ND in ((z1_ND, target2_ND), (z2_ND, target1_ND))
        ]
        return outputs[0].loss + outputs[1].loss, {
            "loss": outputs[0].value + outputs[1].value,
            "positive_similarity": (outputs[0].positive_similarity + outputs[1].positive_similarity) / 2,
            **collapse_figures(z1_ND.detach()),
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the twin towards the network."""
        self.target.update(self._online())

    def _online(self) -> nn.Sequential:
        """Backbone and projector as one module; not kept, or the state dict would hold both twice."""
        return nn.Sequential(self.model, self.projector)


def build_byol(model: nn.Module, config: BYOLConfig, setting: Setting) -> BYOLStep:
    """BYOL around an encoder of pictures."""
    return BYOLStep(image_encoder(model, "byol"), config, setting)
