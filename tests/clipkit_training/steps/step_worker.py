"""One of two gloo ranks that train image Steps on unequal parts of the same batches, under DDP.

The tests import this file too, to do the same in one process with the whole batches.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.models import Encoder
from clipkit_training.steps.base import Step
from clipkit_training.steps.byol import BYOLConfig, build_byol
from clipkit_training.steps.moco_v3 import MocoV3Config, build_moco_v3
from clipkit_training.steps.simclr import SimCLRConfig, build_simclr
from clipkit_training.steps.simsiam import SimSiamConfig, build_simsiam
from clipkit_training.steps.supcon import SupConConfig, build_supcon
from tests.clipkit_training.steps.support import (
    gradients,
    part_of,
    random_batch,
    setting,
    tiny_encoder,
    train,
)
from tests.distributed.support import launch

ROWS, FIRST = 8, 5  # rank 0 has the first five rows
BUILDS = {
    "simclr": (build_simclr, SimCLRConfig(dim=8)),
    "supcon": (build_supcon, SupConConfig(dim=8)),
    "byol": (build_byol, BYOLConfig(momentum=0.5, hidden=16, dim=8)),
    "simsiam": (build_simsiam, SimSiamConfig(dim=8)),
    "moco_v3": (build_moco_v3, MocoV3Config(momentum=0.5, hidden=16, dim=8)),
}


def tiny_step(name: str, group: dist.ProcessGroup | None = None) -> Step:
    """A Step with fixed weights."""
    build, config = BUILDS[name]
    torch.manual_seed(0)
    return build(tiny_encoder(), config, setting(ROWS, group=group))  # pyright: ignore[reportArgumentType]


def _in_float64(step: Step) -> Step:
    """The step in float64: in float32 one process alone is 1e-5 off, through BatchNorm of so few rows."""
    for module in step.double().modules():
        if isinstance(module, Encoder):
            object.__setattr__(module, "forward", partial(_encode, module))
            object.__setattr__(module, "encode", partial(_encode, module))
    return step


def _encode(encoder: Encoder, images_N3SS: Tensor) -> Tensor:
    """`Encoder.encode`, which rounds to float32, without that."""
    pixels = (images_N3SS.double() / 255 - encoder.pixel_mean) / encoder.pixel_std
    return encoder.tower(pixels.contiguous(memory_format=encoder._layout))


def trained(name: str, rank: int | None, group: dist.ProcessGroup | None) -> dict[str, dict[str, Tensor]]:
    """Loss and gradients of the first of three steps, and the state after the last."""
    step = _in_float64(tiny_step(name, group))
    rows = {None: slice(0, ROWS), 0: slice(0, FIRST), 1: slice(FIRST, ROWS)}[rank]
    labels = [0, 1, 2, 0, 1, 2, 0, 3]
    batches = [part_of(random_batch(ROWS, seed=seed, labels=labels), rows) for seed in range(3)]
    forward: nn.Module = step
    if group is not None:
        forward = DistributedDataParallel(step, process_group=group, broadcast_buffers=False)
    figures = train(step, batches[:1], rate=0.02, forward=forward)
    first = gradients(step)
    train(step, batches[1:], rate=0.02, forward=forward)
    return {"loss": {"value": figures[0]["loss"]}, "gradients": first, "state": step.state_dict()}


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    return {name: trained(name, rank, group) for name in BUILDS}


if __name__ == "__main__":
    launch(work, 2)
