"""The forward and the backward pass of `contrast`: two sweeps, and the exchange of candidates around them.

The one idea: what a rank sends are features (or, on a ring, blocks of them) and afterwards their gradients;
what it joins with other ranks in between is a state of eight numbers a column. So each rank scores its own
rows against all candidates once, for both directions, and every gradient is exact: the upstream gradients of
all ranks' columns are gathered too, and the gradients of candidates return to their owners summed.

Shapes: N = rows, m = rows of k, both of this rank; M = rows of k of all ranks; K = shared negatives,
D = features.
"""

from collections.abc import Iterator, Sequence
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
from clipkit.losses import links, sweep
from clipkit.losses.links import Rule, empty_state
from clipkit.losses.problem import (
    Candidates,
    Gradients,
    Pairs,
    Problem,
    Side,
    Similarity,
    finish,
    inverse_length,
    through_length,
    wide,
)
from clipkit.losses.similarity import full_precision
from clipkit.losses.tiles import Tile

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
        """This rank's rows of k among those that come together."""
        return self.place(group_rank(self.group) if self.together else 0)


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


class Memory(NamedTuple):
    """What the backward pass needs of the forward pass, beside the leaves."""

    gathered: Tensor | None  # (M, D), k of all ranks
    need: Tensor  # (5, N), see `links.finish`
    of_need: Tensor | None  # (5, all columns)
    kept: list[Tile] | None
    inverses: "Inverses"


class Inverses(NamedTuple):
    """1 / length of rows and candidates, see `Side`; of k, that of all ranks, unless it comes in blocks."""

    q: Tensor | None
    k: Tensor | None
    negatives: Tensor | None
    own: Tensor | None


def inverses(task: Task, leaves: Leaves, gathered: Tensor | None) -> Inverses:
    """1 / lengths, where the similarity is the cosine."""
    k = None if task.ring else leaves.k if gathered is None else gathered
    return Inverses(*(_inverse(task, x, leaves.scale.dtype) for x in (leaves.q, k, *leaves[2:4])))


def _inverse(task: Task, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return inverse_length(x, dtype) if task.similarity == "cosine" and x is not None else None


def _base(task: Task, leaves: Leaves, known: Inverses) -> Problem:
    """The rows and the negatives; k comes later."""
    start, blocks = task.columns, []
    for x, ids, inverse in (
        (leaves.negatives, task.negative_id, known.negatives),
        (leaves.own, task.own_id, known.own),
    ):
        if x is not None:
            blocks.append(Candidates(x, start, ids, None, inverse))
            start += blocks[-1].width
    rows = Side(leaves.q, task.row_id, task.row_view, known.q)
    pairs = Pairs(task.positive, task.ignore, leaves.log_weight, leaves.log_noise)
    return Problem(rows, tuple(blocks), task.similarity, leaves.scale, leaves.bias, task.rule, pairs)


def _with_columns(
    base: Problem, task: Task, k: Tensor, at: slice, alone: bool, inverse: Tensor | None
) -> Problem:
    """The problem with the columns `at` of all ranks' k, first; `alone`: without the negatives."""
    if task.ring:
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


@torch.no_grad()
def forward_pass(task: Task, leaves: Leaves, keep: bool) -> tuple[Solution, Memory]:
    """The first sweep over all candidates, and the losses; `keep` scores for a backward pass, if they fit."""
    with full_precision(leaves.q):
        of_rows = empty_state(leaves.q.shape[0], leaves.scale)
        of_columns = empty_state(task.columns, leaves.scale) if task.both else None
        gathered = None
        if task.group is not None and task.together and not task.ring:
            gathered = gather_rows(leaves.k, task.sizes, task.group)
        known = inverses(task, leaves, gathered)
        base = _base(task, leaves, known)
        kept: list[Tile] | None = [] if keep and _keeps(task, base) else None
        sums = torch.zeros(2, dtype=wide(of_rows), device=of_rows.device)
        for turn, (k, at) in enumerate(_arrivals(task, leaves.k, gathered)):
            problem = _with_columns(base, task, k, at, turn > 0, known.k)
            sums += sweep.forward(problem, task.block, kept, of_rows, of_columns)
        loss, counted, need = links.finish(of_rows, task.rule)
        solution, of_need = Solution(loss, counted, of_rows, sums), None
        if of_columns is not None:
            if task.group is not None:
                of_columns = _over_group(of_columns, task.group)
            other, other_counted, of_need = links.finish(of_columns, task.rule)
            mine = [x[..., task.mine].clone() for x in (other, other_counted, of_columns)]
            solution = Solution(*solution[:4], *mine)
        return solution, Memory(gathered, need, of_need, kept, known)


@torch.no_grad()
def backward_pass(
    task: Task, leaves: Leaves, memory: Memory, upstream: Tensor | None, of_columns: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The second sweep: gradients of the leaves, in their order, None where not wanted.

    Args:
        task, leaves: as in `forward_pass`.
        memory: what `forward_pass` left.
        upstream: (N,) gradient of the rows' losses, or None for 0.
        of_columns: (m,) gradient of the losses of this rank's columns, or None for 0.
        wanted: for each of the leaves, whether its gradient is.
    """
    with full_precision(leaves.q):
        needs = _times(memory.need, upstream), None
        if memory.of_need is not None:
            mine = (
                leaves.scale.new_zeros(task.mine.stop - task.mine.start) if of_columns is None else of_columns
            )
            every = mine if task.group is None else gather_rows(mine, task.sizes, task.group)
            needs = needs[0], _times(memory.of_need, every)
        return _gradients(task, leaves, memory, needs, wanted)


def _keeps(task: Task, base: Problem) -> bool:
    """Whether the scores of all tiles may be kept for the second sweep."""
    width = task.columns + sum(block.width for block in base.candidates)
    bytes_ = base.rows.features.shape[0] * width * base.scale.element_size()
    return task.block is None and not task.ring and not task.rule.whole_rows and bytes_ <= sweep.KEPT_BYTES


def _times(need: Tensor, upstream: Tensor | None) -> Tensor:
    need = need.clone()
    need[links.UPSTREAM] *= 0.0 if upstream is None else upstream
    return need


def _gradients(
    task: Task, leaves: Leaves, memory: Memory, needs: tuple[Tensor, Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    want, dtype, known = Leaves._make(wanted), leaves.scale.dtype, memory.inverses
    base = _base(task, leaves, known)

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
        problem = _with_columns(base, task, k, at, alone, known.k)
        sweep.backward(problem, task.block, memory.kept, needs, into)
        return k_grad

    if task.ring and task.group is not None:
        own = group_rank(task.group)

        def arrived(owner: int, k: Tensor) -> Tensor | None:
            return visit(k, task.place(owner), owner != own)

        k_grad = ring_sum(leaves.k, task.sizes, task.group, arrived)
    else:
        every = leaves.k if memory.gathered is None else memory.gathered
        k_grad = visit(every, slice(0, every.shape[0]), False)
        if k_grad is not None and task.together and task.group is not None:
            k_grad = reduce_scatter_rows(k_grad, task.sizes, task.group)
    finish(base, into)
    of_k = _inverse(task, leaves.k, dtype) if task.ring else None if known.k is None else known.k[task.mine]
    found = [into.rows if want.q else None]
    for x, gradient, inverse in zip(leaves[1:4], (k_grad, *others), (of_k, *known[2:]), strict=True):
        if x is not None and gradient is not None:
            gradient = through_length(gradient, x, inverse)
        found.append(gradient)
    narrow = [g if g is None or x is None else g.to(x.dtype) for g, x in zip(found, leaves[:4], strict=True)]
    return [*narrow, into.scale, into.bias, into.log_weight, into.log_noise]
