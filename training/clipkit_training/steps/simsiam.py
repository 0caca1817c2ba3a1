"""SimSiam: each view predicts the other; no negatives, no twin, only a stopped gradient.

The one idea: BYOL with the network itself as the target. `embedding_std` near 0 tells a collapse. Each view
goes through the network by itself.

Shapes: N rows of this rank, D dimensions of a projection.
"""

from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import simsiam_predictor, simsiam_projector
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.images import image_encoder, view_pairs


class SimSiamConfig(Config):
    """Options of `simsiam`.

    Args:
        layers: Linear layers of the projector; the paper has 2 for CIFAR-10.
        hidden: Width of the projector's hidden layers; None: of the features.
        dim: D, width of projection and prediction.
        bottleneck: Width of the predictor's hidden layer; None: a quarter of `dim`.
        sync_batch_norm: BatchNorm takes the statistics of all processes.
    """

    layers: int = Field(default=3, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    dim: int = Field(default=2048, ge=1)
    bottleneck: int | None = Field(default=None, ge=1)
    sync_batch_norm: bool = True


class SimSiamStep(Step):
    """Both views predict the projection of the other.

        L = mean_i −½ cos(p_i1, z_i2) − ½ cos(p_i2, z_i1),   p = predictor(z), z on the right without gradient

    Args:
        model: The backbone; its BatchNorm layers are changed in place.
        config: The options.
        setting: The run.

    References:
        Chen and He 2021, "Exploring Simple Siamese Representation Learning", eq. 4 and algorithm 1.
    """

    model: Encoder

    def __init__(self, model: Encoder, config: SimSiamConfig, setting: Setting) -> None:
        super().__init__()
        self.group = setting.group
        over = setting.group if config.sync_batch_norm else None
        projector = simsiam_projector(model.dim, hidden=config.hidden, dim=config.dim, layers=config.layers)
        self.model, self.projector = synchronised(model, over), synchronised(projector, over)
        self.predictor = synchronised(simsiam_predictor(config.dim, hidden=config.bottleneck), over)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's views."""
        z1_ND, z2_ND = (self.projector(self.model.encode(view)) for view in view_pairs(batch))
        outputs = [
            contrast(self.predictor(z_ND), target_ND.detach(), paired=True, link="align", group=self.group)
            for z_ND, target_ND in ((z1_ND, z2_ND), (z2_ND, z1_ND))
        ]
        # the link gives 2 − 2 cos for each direction
        return (outputs[0].loss + outputs[1].loss) / 4 - 1, {
            "loss": (outputs[0].value + outputs[1].value) / 4 - 1,
            "positive_similarity": (outputs[0].positive_similarity + outputs[1].positive_similarity) / 2,
            **collapse_figures(z1_ND.detach()),
        }


def build_simsiam(model: nn.Module, config: SimSiamConfig, setting: Setting) -> SimSiamStep:
    """SimSiam around an encoder of pictures."""
    return SimSiamStep(image_encoder(model, "simsiam"), config, setting)
