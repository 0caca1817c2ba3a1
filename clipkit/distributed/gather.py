"""Gathering rows over a process group, with the exact gradient.

The one idea: the gradient of "rank r's rows were copied to every rank" is "the gradients of all W copies,
summed, go back to rank r". Features travel in their own dtype (bf16 stays 2 bytes, as raw bytes, so that
any backend carries them bit for bit) and their gradients come back summed in float32 or wider. Local
batches may have different sizes: every gather takes the sizes of all ranks, exchanged once per call of a
loss. `group=None` means one process and no collective at all.

Shapes: n = rows of this rank, M = rows of all ranks, D = features, W = ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    total = values.detach().clone()
    if group is not None:
        dist.all_reduce(total, group=group)
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
    raw = local.detach().contiguous().reshape(local.shape[0], math.prod(local.shape[1:])).view(torch.uint8)
    padded = raw.new_zeros(max(sizes), raw.shape[1])  # collectives want equal shapes
    padded[: raw.shape[0]] = raw
    blocks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(blocks, padded, group=group)
    rows = torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])
    return rows.view(local.dtype).reshape(-1, *local.shape[1:])


def _reduce_scatter_rows(grad: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Sum (M, D) over the ranks and return this rank's own rows (n, D)."""
    rank = group_rank(group)
    if grad.is_cuda and "nccl" in dist.get_backend(group):
        longest = max(sizes)
        padded = grad.new_zeros(len(sizes), longest, *grad.shape[1:])
        for block, rows in zip(padded, grad.split(list(sizes)), strict=True):
            block[: rows.shape[0]] = rows
        own = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=group)
        return own[: sizes[rank]]
    total = grad.clone(memory_format=torch.contiguous_format)  # gloo has no reduce-scatter on every build
    dist.all_reduce(total, group=group)
    return total.split(list(sizes))[rank]


class _GatherFeatures(torch.autograd.Function):
    """All tensors in one node, so that backward's collectives run in one fixed order on every rank."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, sizes: Any, dtype: torch.dtype, *local: Tensor) -> Any:
        ctx.group, ctx.sizes, ctx.dtypes = group, sizes, [x.dtype for x in local]
        return tuple(gather_rows(x, n, group).to(dtype) for x, n in zip(local, sizes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        own: list[Tensor | None] = []
        for i, (grad, sizes) in enumerate(zip(grads, ctx.sizes, strict=True)):
            wanted = ctx.needs_input_grad[3 + i]
            own.append(_reduce_scatter_rows(grad, sizes, ctx.group).to(ctx.dtypes[i]) if wanted else None)
        return None, None, None, *own


def gather_features(
    tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]], dtype: torch.dtype, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Features of every rank under one another, widened to `dtype`, differentiable on every rank.

    Args:
        tensors: (n_t, D_t) each, floating; whether each one requires a gradient must agree over the ranks,
            since the backward pass is a collective too.
        sizes: for each tensor, n_t of every rank.
        dtype: dtype of the results and of the summed gradients, float32 or float64.
        group: the process group.

    Returns:
        One (M_t, D_t) tensor of `dtype` for each of `tensors`.
    """
    return _GatherFeatures.apply(group, sizes, dtype, *tensors)  # pyright: ignore[reportReturnType]
