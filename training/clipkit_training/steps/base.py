"""What every method is: a Step, a module that holds the model and makes a loss of one batch.

A Step holds everything that a run must not forget: model, heads, twin, queue, bank, learnable constants. Its
state dict is the checkpoint, its trainable parameters are what the optimizer moves, and its `forward` is
what DistributedDataParallel wraps. Losses gather over the group and return W times this rank's share, so that
DDP's mean over ranks is the gradient of one process with the whole batch.

Shapes: N rows of this rank, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import ConfigError, InputError
from clipkit_data.batches.maker import Batch

Metrics = dict[str, Tensor]
_SPREAD = 0x9E3779B9  # 2^32 / the golden ratio: its multiples, the runs' seeds, are far apart mod 2^32


@dataclass(frozen=True)
class Setting:
    """What a Step may need to know of the run.

    Args:
        group: The processes that train together; None for one alone.
        batch_size: Samples of a step, over all processes.
        total_steps: Length of the run; None where only minutes bound it.
        samples: Training samples, of all sources together; 0 for a stream.
        device: Where the Step runs.
        seed: The run's.
    """

    group: dist.ProcessGroup | None = None
    batch_size: int = 256
    total_steps: int | None = None
    samples: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    @property
    def world(self) -> int:
        """The number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def need_steps(self, what: str) -> int:
        """The length of the run. Raises: ConfigError where it is not known."""
        if self.total_steps is None:
            raise ConfigError(
                f"{what} follows the length of the run, which minutes do not tell",
                hint="give max_steps or max_epochs",
            )
        return self.total_steps

    def need_negatives(self) -> None:
        """See that a sample can have another one as its negative. Raises: ConfigError."""
        if self.samples == 1:
            raise ConfigError(
                "step: its negatives are other samples, but the training data has one sample alone",
                hint="name data with more samples in data.train",
            )

    def generator(self, step: int) -> torch.Generator:
        """What a step draws from: of the run's seed and the step's number, the same on all ranks."""
        return torch.Generator().manual_seed((self.seed * _SPREAD + step) % 2**32)


class Step(nn.Module):
    """A method.

    Subclasses give `forward(batch) -> (loss, metrics)`: the scalar to be differentiated, and the numbers
    worth logging, among them "loss", its value over the whole group.

    Attributes:
        model: What is judged and saved, a `DualEncoder` or an `Encoder`.
        lr_scales: Learning rates of single parameters, by name, relative to the run's.
    """

    model: Any
    lr_scales: Mapping[str, float] = {}

    @torch.no_grad()
    def after_step(self) -> None:
        """What follows the optimizer's step; nothing for most methods."""


def two_views(batch: Batch) -> tuple[Tensor, Tensor]:
    """The two views of a batch, uint8 (N, 3, S, S) each.

    Raises:
        InputError: There are fewer or more.
    """
    if len(batch.views) != 2:
        raise InputError(
            f"this step needs two views of each picture, the data gives {len(batch.views)}",
            hint="set data.views, for example {family: simclr}",
        )
    return batch.views[0], batch.views[1]


@torch.no_grad()
def collapse_figures(features_ND: Tensor) -> Metrics:
    """Signs of a collapse in this rank's batch.

    Args:
        features_ND: Features of one view, of any length, at least two rows.

    Returns:
        `embedding_std`: √D × the mean over dimensions of the standard deviation of the unit embeddings over
        the batch; near 1 where they fill the sphere, 0 where all are one.

    References:
        Chen and He 2021, "Exploring simple Siamese representation learning", section 4.1, figure 2.
    """
    unit_ND = F.normalize(features_ND.float(), dim=1)
    return {"embedding_std": unit_ND.std(dim=0).mean() * unit_ND.shape[1] ** 0.5}
