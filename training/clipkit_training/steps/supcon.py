"""SupCon: SimCLR where all pictures with one label are positives of each other.

The one idea: labels are the ids of the contrast. Every view of a picture with the label is a positive, the
mean over them stands outside of the logarithm, and no row is without one: its other view is there.

Shapes: N rows of this rank.
"""

from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.distributed import unique_ids
from clipkit.errors import InputError
from clipkit.models.heads import sup_con_head
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Setting
from clipkit_training.steps.images import image_encoder
from clipkit_training.steps.simclr import SimCLRStep


class SupConConfig(Config):
    """Options of `supcon`.

    Args:
        temperature: τ of the logits cosine / τ.
        hidden: Width of the head's hidden layer; None: of the features.
        dim: Width of the head's output.
        sync_batch_norm: BatchNorm takes the statistics of all processes.
    """

    temperature: float = Field(default=0.1, gt=0)
    hidden: int | None = Field(default=None, ge=1)
    dim: int = Field(default=128, ge=1)
    sync_batch_norm: bool = True


class SupConStep(SimCLRStep):
    """The supervised contrastive loss over the two views of all pictures of the batch.

        L = 1/2N Σ_i −1/|P_i| Σ_{p∈P_i} log(exp(s_ip) / Σ_{j≠i} exp(s_ij)),   s = cosine / τ

    Args and errors: as `SimCLRStep`.

    References:
        Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2. The authors' code multiplies by
        τ / base temperature, 1 with its defaults.
    """

    def identities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels, and a number of its own for each row of the group, (2N,). Raises: InputError."""
        if len(batch.labels) != len(batch.sample_ids):
            raise InputError(
                f"step: supcon needs a label for each picture, {len(batch.sample_ids)} pictures have "
                f"{len(batch.labels)}",
                hint="set data.label to a field of the samples' metadata",
            )
        if bool((batch.labels < 0).any()):
            raise InputError(
                f"step: supcon needs a label for each picture, {int((batch.labels < 0).sum())} of "
                f"{len(batch.labels)} have none in the field of data.label",
                hint="`clipkit shards filter` drops them, or name another field",
            )
        labels_2N = batch.labels.repeat(2)
        return labels_2N, unique_ids(len(labels_2N), self.group, labels_2N.device)


def build_supcon(model: nn.Module, config: SupConConfig, setting: Setting) -> SupConStep:
    """SupCon with its head of two layers."""
    encoder = image_encoder(model, "supcon")
    head = sup_con_head(encoder.dim, hidden=config.hidden, dim=config.dim)
    return SupConStep(encoder, head, config.temperature, setting, sync_batch_norm=config.sync_batch_norm)
