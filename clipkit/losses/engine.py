"""The autograd node under `contrast`: two sweeps, the exchange of candidates around them, one backward.

The one idea: what a rank sends are features (or, on a ring, blocks of them) and afterwards their gradients;
what it joins with other ranks in between is a state of eight numbers a column. So each rank scores its own
rows against all candidates once, for both directions, and every gradient is exact: the upstream gradients of
all ranks' columns are gathered too, and the gradients of candidates return to their owners summed.

Shapes: N = rows, m = rows of k, both of this rank; M = rows of k of all ranks; K = shared negatives,
D = features.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import (
    gather_rows,
    group_rank,
    max_over_group,
    reduce_scatter_rows,
    ring,
    ring_sum,
    sum_over_group,
)
from clipkit.errors import InputError
from clipkit.losses import links, sweep
from clipkit.losses.links import Rule, empty_state
from clipkit.losses.similarity import full_precision
from clipkit.losses.tiles import (
    Candidates,
    Gradients,
    Pairs,
    Problem,
    Side,
    Similarity,
    Tile,
    finish,
    inverse_length,
    through_length,
)

Exchange = Literal["gather", "ring"]


@dataclass(frozen=True)
class Task:
    """All of a call but the tensors that may have a gradient. Ids and views are (n,) int64.

    Attributes:
        row_id, row_view: of the rows of this rank.
        column_id, column_view: of k; with a group, of the k of all ranks.
        sizes: rows of k of each rank; one number without a group.
        both: collect the columns too, for both directions from one sweep.
        others: what else `contrast` takes, as it takes it.
    """

    row_id: Tensor
    row_view: Tensor
    column_id: Tensor
    column_view: Tensor
    sizes: list[int]
    rule: Rule
    similarity: Similarity
    paired: bool
    both: bool
    negative_id: Tensor | None = None
    own_id: Tensor | None = None
    positive: Tensor | None = None
    ignore: Tensor | None = None
    block: int | None = None
    group: dist.ProcessGroup | None = None
    exchange: Exchange = "gather"

    @property
    def columns(self) -> int:
        return 1 if self.paired else sum(self.sizes)

    @property
    def together(self) -> bool:
        return self.group is not None and not self.paired

    @property
    def ring(self) -> bool:
        return self.together and self.exchange == "ring" and not self.rule.whole_rows

    def place(self, rank: int) -> slice:
        """A rank's columns among all."""
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    @property
    def mine(self) -> slice:
        return self.place(group_rank(self.group))


class Leaves(NamedTuple):
    """The tensors that may have a gradient; scale and bias are 0-d and of the dtype to compute in."""

    q: Tensor  # (N, D)
    k: Tensor  # (m, D)
    negatives: Tensor | None  # (K, D)
    own: Tensor | None  # (N, own, D)
    scale: Tensor
    bias: Tensor
    log_weight: Tensor | None  # both broadcast to (N, all columns)
    log_noise: Tensor | None


class Solution(NamedTuple):
    """Losses of rows (N,) and of this rank's columns (m,), which of them count, states (8, ·), sums (2,)."""

    loss: Tensor
    counted: Tensor
    states: Tensor
    sums: Tensor
    column_loss: Tensor | None = None
    column_counted: Tensor | None = None
    column_states: Tensor | None = None


def solve(task: Task, leaves: Leaves) -> Solution:
    """Evaluate a task. `loss` and `column_loss` are differentiable, once; a collective with a group."""
    return Solution(*_Contrast.apply(task, *leaves))  # pyright: ignore[reportGeneralTypeIssues]


def _inverse(task: Task, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return inverse_length(x, dtype) if task.similarity == "cosine" and x is not None else None


def _base(task: Task, leaves: Leaves) -> Problem:
    """The rows and the negatives; k comes later."""
    dtype, start, blocks = leaves.scale.dtype, task.columns, []
    for x, ids in ((leaves.negatives, task.negative_id), (leaves.own, task.own_id)):
        if x is not None:
            blocks.append(Candidates(x, start, ids, None, _inverse(task, x, dtype)))
            start += blocks[-1].width
    rows = Side(leaves.q, task.row_id, task.row_view, _inverse(task, leaves.q, dtype))
    pairs = Pairs(task.positive, task.ignore, leaves.log_weight, leaves.log_noise)
    return Problem(rows, tuple(blocks), task.similarity, leaves.scale, leaves.bias, task.rule, pairs)


def _with_columns(base: Problem, task: Task, k: Tensor, at: slice, alone: bool) -> Problem:
    """The problem with the columns `at` of all ranks' k, first; `alone`: without the negatives."""
    inverse = _inverse(task, k, base.scale.dtype)
    columns = Candidates(k, at.start, task.column_id[at], task.column_view[at], inverse)
    if task.paired:
        columns = Candidates(
            k[:, None], 0, task.column_id[:, None], task.column_view[:, None],
            None if inverse is None else inverse[:, None],
        )  # fmt: skip
    return replace(base, candidates=(columns, *(() if alone else base.candidates)))


def _arrivals(task: Task, k: Tensor, gathered: Tensor | None) -> Iterator[tuple[Tensor, slice]]:
    """Blocks of all ranks' k as they come to be known here, each with its place among the columns."""
    if task.ring and task.group is not None:
        for owner, block in ring(k, task.sizes, task.group):
            yield block, task.place(owner)
    else:
        every = k if gathered is None else gathered
        yield every, slice(0, every.shape[0])


def _over_group(state: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The states of columns whose rows are spread over ranks: two collectives of a few numbers a column."""
    high = max_over_group(state[: links.SCORE_P], group)
    known = high[: links.BEST_N].masked_fill(high[: links.BEST_N].isinf(), 0.0)
    shares = (state[: links.BEST_N] - known).exp()
    sums = sum_over_group(torch.cat([shares, state[links.SCORE_P :]]), group)
    return torch.cat([known + sums[: links.BEST_N].log(), high[links.BEST_N :], sums[links.BEST_N :]])


class _Contrast(torch.autograd.Function):
    """`Solution` from a task and its leaves."""

    @staticmethod
    def forward(ctx: Any, task: Task, *tensors: Any) -> Any:
        leaves = Leaves(*tensors)
        with full_precision(leaves.q):
            of_rows = empty_state(leaves.q.shape[0], leaves.scale)
            of_columns = empty_state(task.columns, leaves.scale) if task.both else None
            gathered = None
            if task.group is not None and task.together and not task.ring:
                gathered = gather_rows(leaves.k, task.sizes, task.group)
            base = _base(task, leaves)
            kept: list[Tile] | None = [] if any(ctx.needs_input_grad) and _keeps(task, base) else None
            sums = torch.zeros(2, dtype=sweep.wide(of_rows), device=of_rows.device)
            for turn, (k, at) in enumerate(_arrivals(task, leaves.k, gathered)):
                problem = _with_columns(base, task, k, at, turn > 0)
                sums += sweep.forward(problem, task.block, kept, of_rows, of_columns)
            if of_columns is not None and task.group is not None:
                of_columns = _over_group(of_columns, task.group)
            loss, counted, need = links.finish(of_rows, task.rule)
            solution, of_need = Solution(loss, counted, of_rows, sums), None
            if of_columns is not None:
                other, other_counted, of_need = links.finish(of_columns, task.rule)
                columns = [x[..., task.mine].clone() for x in (other, other_counted, of_columns)]
                solution = Solution(*solution[:4], *columns)
        fixed = (
            solution.counted,
            solution.states,
            solution.sums,
            solution.column_counted,
            solution.column_states,
        )
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        ctx.set_materialize_grads(False)
        ctx.task, ctx.kept = task, kept is not None
        ctx.save_for_backward(*leaves, gathered, need, of_need, *(x for tile in kept or () for x in tile))
        return tuple(solution)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        saved = ctx.saved_tensors
        leaves, (gathered, need, of_need), flat = Leaves(*saved[:8]), saved[8:11], saved[11:]
        kept = [Tile(*flat[i : i + 5]) for i in range(0, len(flat), 5)] if ctx.kept else None
        with torch.no_grad(), full_precision(leaves.q):
            needs = (
                _times(need, upstream[0]),
                None if of_need is None else _columns(ctx.task, of_need, upstream[4]),
            )
            grads = _gradients(ctx.task, leaves, gathered, needs, kept, ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            anchors = [x for x in (*upstream, *leaves) if x is not None and x.requires_grad]
            grads = [None if g is None else _Once.apply(g, *anchors) for g in grads]
        return None, *grads


class _Once(torch.autograd.Function):
    """A gradient as it is, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise InputError(
            "contrast() was differentiated twice: its second derivatives are not implemented (the scores are "
            "recomputed, not kept). Build the loss from torch operations where you need them"
        )


def _keeps(task: Task, base: Problem) -> bool:
    """Whether the scores of all tiles may be kept for the second sweep."""
    width = task.columns + sum(block.width for block in base.candidates)
    bytes_ = base.rows.features.shape[0] * width * base.scale.element_size()
    return task.block is None and not task.ring and not task.rule.whole_rows and bytes_ <= sweep.KEPT_BYTES


def _times(need: Tensor, upstream: Tensor | None) -> Tensor:
    need = need.clone()
    need[links.UPSTREAM] *= 0.0 if upstream is None else upstream
    return need


def _columns(task: Task, need: Tensor, upstream: Tensor | None) -> Tensor:
    """`need` of all columns, each times the upstream gradient that its own rank has."""
    mine = need.new_zeros(task.mine.stop - task.mine.start) if upstream is None else upstream
    return _times(need, mine if task.group is None else gather_rows(mine, task.sizes, task.group))


def _gradients(
    task: Task, leaves: Leaves, gathered: Tensor | None, needs: tuple[Tensor, Tensor | None],
    kept: list[Tile] | None, wanted: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the leaves, in their order, None where not wanted."""
    want, dtype, base = Leaves._make(wanted), leaves.scale.dtype, _base(task, leaves)

    def sums(x: Any, wanted: Any) -> Any:
        return torch.zeros(x.shape, dtype=dtype, device=x.device) if wanted else None

    rows = sums(leaves.q, want.q or (want.scale and task.similarity != "euclidean"))
    others = [sums(x, w) for x, w in zip(leaves[2:4], want[2:4], strict=True)]
    into = Gradients(rows, [], *(sums(x, w) for x, w in zip(leaves[4:], want[4:], strict=True)))

    def visit(k: Tensor, at: slice, alone: bool) -> Tensor | None:
        k_grad = sums(k, want.k)
        into.candidates = [k_grad[:, None] if task.paired and want.k else k_grad]
        into.candidates += (
            [] if alone else [g for g, x in zip(others, leaves[2:4], strict=True) if x is not None]
        )
        sweep.backward(_with_columns(base, task, k, at, alone), task.block, kept, needs, into)
        return k_grad

    if task.ring and task.group is not None:
        own = group_rank(task.group)

        def arrived(owner: int, k: Tensor) -> Tensor | None:
            return visit(k, task.place(owner), owner != own)

        k_grad = ring_sum(leaves.k, task.sizes, task.group, arrived)
    else:
        every = leaves.k if gathered is None else gathered
        k_grad = visit(every, slice(0, every.shape[0]), False)
        if k_grad is not None and task.together and task.group is not None:
            k_grad = reduce_scatter_rows(k_grad, task.sizes, task.group)
    finish(base, into)
    found = [into.rows if want.q else None]
    for x, gradient in zip(leaves[1:4], (k_grad, *others), strict=True):
        if x is not None and gradient is not None:
            gradient = through_length(gradient, x, _inverse(task, x, dtype))
        found.append(gradient)
    narrow = [g if g is None or x is None else g.to(x.dtype) for g, x in zip(found, leaves[:4], strict=True)]
    return [*narrow, into.scale, into.bias, into.log_weight, into.log_noise]
