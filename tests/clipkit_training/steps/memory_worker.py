"""One of two gloo ranks that train a Step with a queue or a bank on their parts of the same batches.

The tests import this file too, to make the same Steps and to train them in one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clipkit_data.batches.maker import Batch
from clipkit_training.steps import Step, build_step
from tests.clipkit_training.steps.support import (
    gradients,
    part_of,
    random_batch,
    setting,
    tiny_encoder,
    train,
)
from tests.distributed.support import launch

RATE, SAMPLES = 0.05, 40
MOCO = {"name": "moco_v2", "queue": 20, "momentum": 0.9, "dim": 6, "hidden": 10, "groups": 2}
INSTDISC = {"name": "instdisc", "dim": 6, "temperature": 0.2}
NCE = {"name": "nce", "dim": 6, "temperature": 0.2, "draws": 12}

CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "moco, unequal": ("group_norm", [10, 6], MOCO | {"symmetric": True, "queue": 40}),
    "moco, shuffled": ("batch_norm", [8, 8], MOCO),
    "moco, shuffled in four": ("batch_norm", [16, 16], MOCO | {"groups": 4, "queue": 70, "symmetric": True}),
    "instdisc": ("group_norm", [7, 5], INSTDISC),
    "instdisc, draws": ("group_norm", [7, 5], INSTDISC | {"draws": 9}),
    "nce, learnable": ("group_norm", [7, 5], NCE),
    "nce, moving": ("group_norm", [7, 5], NCE | {"z": "moving"}),
    "instdisc, batch norm": ("batch_norm", [18, 14], INSTDISC),
    "nce, batch norm": ("batch_norm", [18, 14], NCE),
}


def tiny(options: dict[str, Any], tower: str = "group_norm", rows: int = 8, **more: Any) -> Step:
    """A Step around a tiny encoder; the same options make the same weights."""
    torch.manual_seed(1)
    return build_step(tiny_encoder(tower), options, setting(rows, **more))


def batches(
    count: int, rows: int = 8, *, first: int = 0, views: int = 2, samples: int = SAMPLES
) -> list[Batch]:
    """Batches of different pictures, whose samples go round and round."""
    return [
        random_batch(rows, seed=step, step=step, views=views, sample_ids=places, index=places)
        for step in range(first, first + count)
        for places in [[(step * rows + row) % samples for row in range(rows)]]
    ]


def trained(case: str, rank: int | None, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Figures, gradients and state after four steps, on the part of a rank or on whole batches."""
    tower, sizes, options = CASES[case]
    step = tiny(options, tower, sum(sizes), samples=SAMPLES, group=group)
    start = 0 if rank is None else sum(sizes[:rank])
    part = slice(start, sum(sizes) if rank is None else start + sizes[rank])
    views = 2 if "moco" in case else 0
    mine = [part_of(batch, part) for batch in batches(4, sum(sizes), views=views)]
    forward = None
    if group is not None:
        forward = DistributedDataParallel(step, process_group=group, broadcast_buffers=False)
    figures, state = train(step, mine, RATE, forward), step.state_dict()
    figures = [{name: x for name, x in found.items() if name != "embedding_std"} for found in figures]
    return {
        "figures": {name: torch.stack([found[name] for found in figures]) for name in figures[0]},
        "gradients": gradients(step),
        "state": {name: x for name, x in state.items() if x.is_floating_point() and "running" not in name},
        "places": {name: x for name, x in state.items() if not x.is_floating_point()},
    }


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds."""
    return {case: trained(case, rank, group) for case in CASES}


if __name__ == "__main__":
    launch(work, 2)
