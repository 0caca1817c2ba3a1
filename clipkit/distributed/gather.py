"""Rows of all ranks of a process group, and the way back for their gradients.

The one idea: the gradient of "rank r's rows were copied to every rank" (`gather_rows`) is "the gradients of
all W copies, summed, go back to rank r" (`reduce_scatter_rows`). Features travel in their own dtype (bf16
stays 2 bytes, as raw bytes, so that any backend carries them bit for bit) and their gradients come back
summed in float32 or wider. Local batches may have different sizes: every call takes the sizes of all ranks,
exchanged once per call of a loss. `group=None` means one process and no collective at all.

Shapes: n = rows of this rank, M = rows of all ranks, D = features, W = ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.errors import InputError

_IDS_PER_RANK = 1 << 40  # more rows than any batch has; the rank sits in the bits above


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks W of `group` (1 for None)."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank inside `group` (0 for None).

    Raises:
        InputError: this process is not a member of the group.
    """
    if group is None:
        return 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("group: this process is not a member of the process group it was given")
    return rank


def unique_ids(n: int, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """int64 (n,) ids 0…n−1 shifted by the rank: distinct over the whole group, with no communication."""
    return torch.arange(n, device=device) + group_rank(group) * _IDS_PER_RANK


def exchange(values: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Every rank's `values`, in the order of ranks: W lists as long as `values`."""
    mine = torch.tensor(list(values), dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(group_size(group))]
    dist.all_gather(everyone, mine, group=group)
    return torch.stack(everyone).tolist()


def sum_over_group(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of `values` over the ranks, the same on each of them; carries no gradient."""
    return _all_reduce(values, dist.ReduceOp.SUM, group)


def max_over_group(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The element-wise maximum of `values` over the ranks, the same on each of them; carries no gradient."""
    return _all_reduce(values, dist.ReduceOp.MAX, group)


def _all_reduce(values: Tensor, how: Any, group: dist.ProcessGroup | None) -> Tensor:
    total = values.detach().clone()
    if group is not None:
        dist.all_reduce(total, op=how, group=group)
    return total


@torch.no_grad()
def gather_rows(local: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Rows of every rank under one another, in the order of ranks; no gradient.

    Args:
        local: (n, …), any dtype; the same trailing shape on every rank.
        sizes: n of every rank.
        group: the process group.

    Returns:
        (sum of sizes, …), on every rank the same, bit for bit.
    """
    if max(sizes) == 0:
        return local.detach().clone()
    padded = local.new_zeros(max(sizes), math.prod(local.shape[1:]))  # collectives want equal shapes
    padded[: local.shape[0]] = local.detach().reshape(local.shape[0], padded.shape[1])
    raw = padded.view(torch.uint8)
    blocks = [torch.empty_like(raw) for _ in sizes]
    dist.all_gather(blocks, raw, group=group)
    rows = torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])
    return rows.view(local.dtype).reshape(-1, *local.shape[1:])


def reduce_scatter_rows(values: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of (M, …), of which each rank gets its own rows (n, …); no gradient.

    `values` is overwritten.
    """
    rank = group_rank(group)
    if values.is_cuda and "nccl" in dist.get_backend(group):
        padded = values.new_zeros(len(sizes), max(sizes), *values.shape[1:])
        for block, rows in zip(padded, values.split(list(sizes)), strict=True):
            block[: rows.shape[0]] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=group)
        return own[: sizes[rank]]
    # gloo has no reduce-scatter on every build: one reduce to each rank moves no more than that
    for other, rows in enumerate(values.split(list(sizes))):
        if sizes[other]:
            dist.reduce(rows, dst=dist.get_global_rank(group, other), group=group)
    return values.split(list(sizes))[rank].clone()
