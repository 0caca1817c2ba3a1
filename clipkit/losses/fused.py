"""The sweeps' way through Triton kernels: slabs of scores that are never written, on CUDA devices.

The one idea: a slab's states come from one kernel, and from another W = dL/ds times what takes it to raw
features; then W k and Wᵀ q are two products of torch's own matrix library, with sums in float32. So no
kernel reads or writes a gradient, whatever D is. Everything that the kernels do not know (masks, candidates
that rows bring along, euclidean distances, float64) goes the way of `tiles`, with the same numbers.
Products are those of raw features, in float32: ‖q‖ ‖k‖ must stay below 1e30, where tiles take any lengths.

Shapes: n, c = rows and columns of a slab, D = features.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from clipkit.losses.problem import Candidates, Gradients, Problem

ROWS = 4096  # of a slab: enough blocks for a device, and few passes over the gradients of columns
_PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}  # of float32 products, as torch's are


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def takes(problem: Problem, block: Candidates) -> bool:
    """Whether the kernels score these candidates."""
    q, pairs = problem.rows.features, problem.pairs
    plain = not pairs.masks and pairs.log_noise is None and not block.own
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # runs on the CPU: slow, for tests
    if not plain or problem.similarity == "euclidean" or not (q.is_cuda or interpreted) or not _installed():
        return False
    from clipkit.losses import triton_tiles

    same = q.dtype == block.features.dtype
    return same and q.dtype in triton_tiles.DTYPES and triton_tiles.supports(problem.rule)


def columns_at_once(budget: int, dtype: torch.dtype) -> int:
    """Columns of a slab whose W takes `budget` bytes."""
    return max(1, budget // (ROWS * (2 if dtype == torch.bfloat16 else 4)))


def _arguments(problem: Problem, at: slice, block: Candidates, columns: slice) -> dict[str, Any]:
    def side(features: Tensor, inverse: Tensor | None, part: slice, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = features[part]
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        return x, scale.expand(x.shape[0]) if inverse is None else inverse[part, 0] * scale

    q, q_factor = side(problem.rows.features, problem.rows.inverse, at, problem.scale)
    k, k_factor = side(block.features, block.inverse, columns, torch.ones_like(problem.scale))
    return {
        "q": q, "k": k, "q_factor": q_factor, "k_factor": k_factor, "bias": problem.bias,
        "row_id": problem.rows.id[at], "row_view": problem.rows.view[at],
        "column_id": None if block.id is None else block.id[columns],
        "column_view": None if block.view is None else block.view[columns],
        "rule": problem.rule, "precision": _PRECISION[torch.get_float32_matmul_precision()],
    }  # fmt: skip


def states(
    problem: Problem, at: slice, block: Candidates, columns: slice, both: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """States of the rows (8, n), of the columns (8, c) or None, and the sums (2,) of `Rows.tile`."""
    from clipkit.losses import triton_tiles

    return triton_tiles.states(**_arguments(problem, at, block, columns), both=both)


def push(
    problem: Problem, at: slice, number: int, columns: slice, need: tuple[Tensor, Tensor | None],
    into: Gradients,
) -> None:  # fmt: skip
    """Add a slab's part to the gradients, given what `links.finish` left of its rows and columns."""
    from clipkit.losses import triton_tiles

    block, target = problem.candidates[number], into.candidates[number]
    given = _arguments(problem, at, block, columns)
    q, k = given["q"], given["k"]
    narrow = q.dtype if q.dtype == torch.bfloat16 else torch.float32  # float16 would lose small slopes
    w, total = triton_tiles.slopes(**given, row_need=need[0], column_need=need[1], dtype=narrow)
    if into.bias is not None and problem.rule.logistic:
        into.bias += total
    if into.rows is not None:
        into.rows[at].addcdiv_(_product(w, k), _divisor(given["q_factor"]))
    if target is not None:
        target[columns].addcdiv_(_product(w.mT, q), _divisor(given["k_factor"]))


def _divisor(factor: Tensor) -> Tensor:
    """The factors that are in W already, as a column; rows of zeros have none, and no gradient."""
    return factor.masked_fill(factor == 0, 1.0)[:, None]


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y in float32."""
    if x.is_cuda and x.dtype == y.dtype == torch.bfloat16:
        return torch.mm(x, y, out_dtype=torch.float32)
    return x.float() @ y.float()
