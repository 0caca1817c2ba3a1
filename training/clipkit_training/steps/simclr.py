"""SimCLR: each view must find the other view of its picture among all views of the batch.

The one idea: the rest of the batch are the negatives, so its size decides. Both views go through the network
together, as in the authors' code: BatchNorm takes its statistics over the 2N views, of all processes. A
picture that is in a batch twice is no negative of itself.

Shapes: N rows of this rank, D dimensions of an embedding.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import synchronised
from clipkit.models.heads import SimCLRHead, simclr_head
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.images import image_encoder, view_pairs


class SimCLRConfig(Config):
    """Options of `simclr`.

    Args:
        temperature: τ of the logits cosine / τ; the authors' code has 0.1 for ImageNet, 0.5 for CIFAR-10.
        head: "v1" with one hidden layer, "v2" with two, "linear", or "none" for the loss on the features.
        hidden: Width of the hidden layers; None: of the features.
        dim: D, width of the head's output.
        sync_batch_norm: BatchNorm takes the statistics of all processes.
    """

    temperature: float = Field(default=0.5, gt=0)
    head: SimCLRHead = "v1"
    hidden: int | None = Field(default=None, ge=1)
    dim: int = Field(default=128, ge=1)
    sync_batch_norm: bool = True


class SimCLRStep(Step):
    """NT-Xent over the two views of all pictures of the batch.

        L = 1/2N Σ_i −log(exp(s_ip) / Σ_{j≠i} exp(s_ij)),   s = cosine / τ

    Args:
        model: The backbone.
        head: Maps its features to embeddings.
        temperature: τ > 0.
        setting: The run.
        sync_batch_norm: BatchNorm takes the statistics of all processes; changes `model` in place.

    Raises:
        ConfigError: There is one training sample alone.

    References:
        Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", eq. 1
        and algorithm 1. The authors' code minimises twice this.
    """

    model: Encoder

    def __init__(
        self, model: Encoder, head: nn.Module, temperature: float, setting: Setting, *, sync_batch_norm: bool
    ) -> None:
        super().__init__()
        setting.need_negatives()
        over = setting.group if sync_batch_norm else None
        self.model, self.head = synchronised(model, over), synchronised(head, over)
        self.temperature, self.group = temperature, setting.group

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's views."""
        views = view_pairs(batch)
        ids_2N, view_2N = self.identities(batch)
        z_2ND = self.head(self.model.encode(torch.cat(views)))
        output = contrast(
            z_2ND,
            z_2ND,
            q_id=ids_2N.to(z_2ND.device),
            q_view=view_2N.to(z_2ND.device),
            k_view=view_2N.to(z_2ND.device),
            scale=1 / self.temperature,
            group=self.group,
        )
        assert output.accuracy is not None
        return output.loss, {
            "loss": output.value,
            "accuracy": output.accuracy,
            "positive_similarity": output.positive_similarity,
            "negative_similarity": output.negative_similarity,
            **collapse_figures(z_2ND[: len(views[0])].detach()),
        }

    def identities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Ids and views of the rows, (2N,): equal ids are positives; with equal views, the row itself."""
        return batch.sample_ids.repeat(2), torch.arange(2).repeat_interleave(len(batch.sample_ids))


def build_simclr(model: nn.Module, config: SimCLRConfig, setting: Setting) -> SimCLRStep:
    """SimCLR with the head of its first or second version."""
    encoder = image_encoder(model, "simclr")
    head = simclr_head(encoder.dim, config.head, hidden=config.hidden, dim=config.dim)
    return SimCLRStep(encoder, head, config.temperature, setting, sync_batch_norm=config.sync_batch_norm)
