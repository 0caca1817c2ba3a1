"""Rows of all ranks one block at a time, on a ring: for sides that do not fit into one rank's memory.

The one idea: in each of W turns a rank works on one rank's block while the next one is on its way, so it
holds two blocks and never all of them. On the way back each block travels with the sum of its gradients; a
rank works out its own part while that sum is on its way to it, adds the two and passes them on, and after W
turns the sum is back with the owner. The same numbers as gathering, in W − 1 messages instead of a
collective.

Shapes: n = rows of this rank, n_r = of rank r, D = features, W = ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed.gather import group_rank


class _Passing:
    """A message to the next rank and one from the rank before, under way together."""

    def __init__(self, sent: Tensor, shape: tuple[int, ...], group: dist.ProcessGroup) -> None:
        rank, world = group_rank(group), dist.get_world_size(group)
        to = dist.get_global_rank(group, (rank + 1) % world)
        come = dist.get_global_rank(group, (rank - 1) % world)
        self.sent = sent.contiguous()  # kept until it has left
        self.received = torch.empty(shape, dtype=sent.dtype, device=sent.device)
        operations = []
        if self.sent.numel():
            operations.append(dist.P2POp(dist.isend, _bytes(self.sent), to, group))
        if self.received.numel():
            operations.append(dist.P2POp(dist.irecv, _bytes(self.received), come, group))
        self.works: list[Any] = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)  # any backend carries these, whatever the dtype


def ring(local: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Each rank's rows in turn, this rank's first, then of the ranks before it; no gradient.

    Args:
        local: (n, D) rows of this rank.
        sizes: n_r of every rank.
        group: the process group; every rank must go through all turns.

    Yields:
        The owner's rank in the group, and its rows (n_r, D).
    """
    world, rank = len(sizes), group_rank(group)
    block = local.detach().contiguous()
    for turn in range(world):
        owner, after = (rank - turn) % world, (rank - turn - 1) % world
        last = turn == world - 1
        coming = None if last else _Passing(block, (sizes[after], *local.shape[1:]), group)
        yield owner, block
        if coming is not None:
            block = coming.wait()


def ring_sum(
    local: Tensor, sizes: Sequence[int], group: dist.ProcessGroup,
    visit: Callable[[int, Tensor], Tensor | None],
) -> Tensor | None:  # fmt: skip
    """Send every rank's rows around once; bring back the sum of what `visit` made of them on each rank.

    Args:
        local: (n, D) rows of this rank.
        sizes: n_r of every rank.
        group: the process group.
        visit: from the owner's rank and its rows (n_r, D) to this rank's part of the sum (n_r, D), the same
            dtype on every rank, or None on all of them for nothing to bring back.

    Returns:
        (n, D), the sum over the ranks for this rank's rows, or None.
    """
    underway: _Passing | None = None
    for owner, block in ring(local, sizes, group):
        part = visit(owner, block)
        if len(sizes) == 1:
            return part
        if part is None:
            continue
        if underway is not None:
            part += underway.wait()
        underway = _Passing(part, (sizes[(owner - 1) % len(sizes)], *part.shape[1:]), group)
    return None if underway is None else underway.wait()
