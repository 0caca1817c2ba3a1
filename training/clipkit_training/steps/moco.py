"""MoCo v1 and v2: each picture's query must find its own key among the keys of many batches before.

The one idea: keys come from a slow twin, so those of some batches ago are still good negatives. They are
queued with their samples' ids: a stale key of the query's own picture is never a negative.

BatchNorm: statistics shared by a query and its key alone would give the pair away. So they are of groups of
rows, and keys are encoded in another order, each among others than its query. Groups are of the global batch:
one in each of 8 processes (the paper's shuffling BN, section 3.3) is 8 in one, if 8 divides the batch.

Shapes: n rows of this rank, N rows of all ranks, D dimensions of an embedding, K keys in the queue.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.config import Config
from clipkit.distributed import exchange, gather_rows, group_rank
from clipkit.errors import ConfigError
from clipkit.losses import contrast
from clipkit.models import Encoder
from clipkit.models.batch_norm import split
from clipkit.models.heads import moco_head
from clipkit.state import Ema, Queue
from clipkit_data.batches.maker import Batch
from clipkit_training.steps.base import Metrics, Setting, Step, collapse_figures
from clipkit_training.steps.images import image_encoder, view_pairs

_LEAST_ROWS = 8  # of a group with BatchNorm statistics of its own


class MocoV1Config(Config):
    """Options of `moco_v1`.

    Args:
        temperature: τ of the logits cosine / τ.
        queue: How many keys are kept, at least those of one step.
        momentum: Weight of the twin's old weights in each step.
        dim: D, the width of the head's output.
        groups: Of the global batch, each with BatchNorm statistics of its own, of 8 rows or more.
        symmetric: Whether each view is a query once; in the papers only the first is.
    """

    temperature: float = Field(default=0.07, gt=0)
    queue: int = Field(default=65536, ge=1)
    momentum: float = Field(default=0.999, ge=0, le=1)
    dim: int = Field(default=128, ge=1)
    groups: int = Field(default=8, ge=1)
    symmetric: bool = False


class MocoV2Config(MocoV1Config):
    """Options of `moco_v2`: those of `moco_v1`, and `hidden`, of the head; None is the features' width."""

    temperature: float = Field(default=0.2, gt=0)
    hidden: int | None = Field(default=None, ge=1)


class MocoStep(Step):
    """Queries of one view against the twin's keys of the other and a queue of earlier keys.

        L_i = −log(exp(⟨q_i, k_i⟩ / τ) / (exp(⟨q_i, k_i⟩ / τ) + Σ_j exp(⟨q_i, k_j⟩ / τ))),  j in the queue

    A step, as in the paper's algorithm 1: queries; the twin moves towards the weights that made them; keys;
    loss; keys into the queue. In a run's first step the last two change places, or there were no negatives.

    Args:
        model: The backbone, whose BatchNorm layers become split ones under the same names.
        head: From its features to embeddings.
        config, setting: The options, and the run.

    Raises:
        ConfigError: The queue does not hold the keys of one step, or there is one sample alone.
    """

    def __init__(self, model: Encoder, head: nn.Module, config: MocoV1Config, setting: Setting) -> None:
        super().__init__()
        setting.need_negatives()
        if config.queue < (keys := setting.batch_size * (2 if config.symmetric else 1)):
            words = f"step: queue is {config.queue}, less than the {keys} keys of one step"
            raise ConfigError(words, hint="set step.queue to many times that")
        self.config, self.group, self.generator = config, setting.group, setting.generator
        groups = max(1, min(config.groups, setting.batch_size // _LEAST_ROWS) // setting.world)
        self.shuffles = groups * setting.world > 1 and any(isinstance(m, _BatchNorm) for m in model.modules())
        if self.shuffles:
            model.tower = split(model.tower, groups)
        self.model, self.head = model, head
        self.twin = Ema(self._encoder(), config.momentum, buffers="own")
        self.queue = Queue(config.queue, config.dim)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss of a batch's views; the twin moves and the keys are queued."""
        views = view_pairs(batch)
        ids_n = batch.sample_ids.to(views[0].device)
        directions = (views, views[::-1]) if self.config.symmetric else (views,)
        queries = [self._encoder()(query) for query, _ in directions]
        self.twin.update(self._encoder())
        keys = [self._keys(key, batch.step) for _, key in directions]
        empty = len(self.queue) == 0
        if empty:
            self._enqueue(keys, ids_n)
        past_KD, past_id_K = self.queue.valid()
        shared: dict[str, Any] = {"q_id": ids_n, "negatives": past_KD, "negative_id": past_id_K}
        shared |= {"paired": True, "scale": 1 / self.config.temperature, "group": self.group}
        outputs = [contrast(q_nD, k_nD, **shared) for q_nD, k_nD in zip(queries, keys, strict=True)]
        if not empty:
            self._enqueue(keys, ids_n)
        names = ("loss", "value", "accuracy", "positive_similarity", "negative_similarity")
        mean = {name: torch.stack([getattr(out, name) for out in outputs]).mean() for name in names}
        return mean.pop("loss"), {"loss": mean.pop("value"), **mean, **collapse_figures(queries[0])}

    def _encoder(self) -> nn.Sequential:
        """Backbone and head as one; made anew each time, since a state dict must not hold them twice."""
        return nn.Sequential(self.model, self.head)

    def _enqueue(self, keys: list[Tensor], ids_n: Tensor) -> None:
        for k_nD in keys:
            self.queue.enqueue(k_nD, ids_n, group=self.group)

    @torch.no_grad()
    def _keys(self, images_n3SS: Tensor, step: int) -> Tensor:
        """The twin's embeddings (n, D), encoded in an order of the global batch drawn for the step."""
        if not self.shuffles:
            return self.twin(images_n3SS)
        n, group, device = len(images_n3SS), self.group, images_n3SS.device
        sizes = [n] if group is None else [size for (size,) in exchange([n], group, device)]
        first = sum(sizes[: group_rank(group)])
        own = slice(first, first + n)
        order_N = torch.randperm(sum(sizes), generator=self.generator(step)).to(device)

        def everyone(rows_n: Tensor) -> Tensor:
            return rows_n if group is None else gather_rows(rows_n, sizes, group)

        return everyone(self.twin(everyone(images_n3SS)[order_N[own]]))[order_N.argsort()[own]]


def build_moco_v1(model: nn.Module, config: MocoV1Config, setting: Setting) -> MocoStep:
    """MoCo with a linear head (He et al. 2020, "Momentum Contrast")."""
    encoder = image_encoder(model, "moco_v1")
    return MocoStep(encoder, moco_head(encoder.dim, "v1", dim=config.dim), config, setting)


def build_moco_v2(model: nn.Module, config: MocoV2Config, setting: Setting) -> MocoStep:
    """MoCo's two-layer head (Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning")."""
    encoder = image_encoder(model, "moco_v2")
    head = moco_head(encoder.dim, "v2", hidden=config.hidden, dim=config.dim)
    return MocoStep(encoder, head, config, setting)
