"""One direction of a contrastive problem, evaluated over blocks of rows.

A `Problem` holds everything after checking, widening and gathering: the rows of this process and all their
candidates. `block_of_rows` scores one block of rows, finds positives and negatives from ids and views, and
hands the tile to a link. It is a pure function of the problem and a slice, so `solve` may evaluate it in
one go, or block by block with each block recomputed in the backward pass, with the same numbers; any other
way of sweeping the tiles can take its place.

Candidates (columns C) stand in this order: k (M of them, or the row's own one when paired), the K shared
negatives, the m negatives of the row itself.

Shapes: N = rows, M = rows of k, K = shared negatives, m = own negatives of a row, D = features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipkit.losses.links import Rule, Tile, reduce_rows

Similarity = Literal["cosine", "inner_product", "euclidean"]
_KEPT_SCORES = 1 << 24  # up to this many scores are kept for backward; above it they are recomputed

# What `Solution.sums` holds, in this order: sums over the counted rows (or over pairs).
WEIGHT, ROWS, SKIPPED, LOSS, INFORMATION, SEVERAL, CANDIDATES, JUDGED, CORRECT = range(9)
POSITIVE_SUM, POSITIVES, NEGATIVE_SUM, NEGATIVES = range(9, 13)


@dataclass(frozen=True)
class Side:
    """Rows with their identity: features (n, D), ids (n,) int64, views (n,) int64."""

    features: Tensor
    id: Tensor
    view: Tensor


@dataclass(frozen=True)
class Problem:
    """One direction: rows of this process against all of their candidates."""

    rows: Side
    columns: Side
    paired: bool
    similarity: Similarity
    scale: Tensor
    bias: Tensor
    rule: Rule
    negatives: Tensor | None = None  # (K, D)
    negative_id: Tensor | None = None  # (K,)
    own: Tensor | None = None  # (N, m, D)
    own_id: Tensor | None = None  # (N, m)
    positive: Tensor | None = None  # these four broadcast to (N, C)
    ignore: Tensor | None = None
    log_weight: Tensor | None = None
    log_noise: Tensor | None = None
    weight: Tensor | None = None  # (N,)

    @property
    def num_candidates(self) -> int:
        shared = 0 if self.negatives is None else self.negatives.shape[0]
        own = 0 if self.own is None else self.own.shape[1]
        return (1 if self.paired else self.columns.features.shape[0]) + shared + own


@dataclass(frozen=True)
class Solution:
    """Losses of the rows (N,), which of them count (N,), and the sums for the statistics."""

    loss: Tensor
    counted: Tensor
    sums: Tensor


def solve(problem: Problem, block: int | None = None) -> Solution:
    """Evaluate all rows, `block` rows at a time (None: as many as fit the memory budget)."""
    n = problem.rows.features.shape[0]
    if block is None:
        block = max(1, _KEPT_SCORES // max(1, problem.num_candidates))
    if n <= block:
        return Solution(*_block_of_rows(problem, slice(0, n)))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, n, block):
        rows = slice(start, min(n, start + block))
        if torch.is_grad_enabled():
            part = checkpoint(_block_of_rows, problem, rows, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportArgumentType]
        else:
            part = _block_of_rows(problem, rows)
        parts.append(part)  # pyright: ignore[reportArgumentType]
    loss, counted, sums = zip(*parts, strict=True)
    return Solution(torch.cat(loss), torch.cat(counted), torch.stack(sums).sum(0))


def _block_of_rows(problem: Problem, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    similarity_nC = _similarities(problem, rows)
    positive_nC, negative_nC = _relations(problem, rows)
    score_nC = similarity_nC * problem.scale + problem.bias
    if problem.log_noise is not None:
        score_nC = score_nC - _take(problem.log_noise, rows)
    log_weight = None if problem.log_weight is None else _take(problem.log_weight, rows)
    tile = Tile(score_nC, positive_nC, negative_nC, log_weight)
    loss_n, counted_n = reduce_rows(tile, problem.rule)
    weight_n = None if problem.weight is None else problem.weight[rows]
    sums = _statistics(similarity_nC.detach(), tile, loss_n.detach(), counted_n, weight_n)
    return loss_n, counted_n, sums


def _take(x: Tensor, rows: slice) -> Tensor:
    """The block's rows of something that broadcasts to (N, C)."""
    return x if x.dim() < 2 or x.shape[0] == 1 else x[rows]


def _between(x: Tensor, y: Tensor, kind: Similarity) -> Tensor:
    """Similarity of (…, n, D) and (…, m, D) → (…, n, m), higher is closer."""
    if kind == "euclidean":
        return -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return x @ y.mT


def _similarities(problem: Problem, rows: slice) -> Tensor:
    q_nD, kind = problem.rows.features[rows], problem.similarity
    if problem.paired:
        own_nD = problem.columns.features[rows]
        parts = [_between(q_nD[:, None], own_nD[:, None], kind)[:, 0]]
    else:
        parts = [_between(q_nD, problem.columns.features, kind)]
    if problem.negatives is not None:
        parts.append(_between(q_nD, problem.negatives, kind))
    if problem.own is not None:
        parts.append(_between(q_nD[:, None], problem.own[rows], kind)[:, 0])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@torch.no_grad()
def _relations(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Which candidates are positives and which are negatives of their row, (n, C) bool each.

    k: positive if the id is the row's, unless it is the row itself (same id and same view).
    Shared and own negatives: never positive; one with the row's own id (a stale key of the same
    sample in a queue) is left out.
    """
    id_n1, view_n1 = problem.rows.id[rows, None], problem.rows.view[rows, None]
    pick = rows if problem.paired else slice(None)
    column_id, column_view = problem.columns.id[pick], problem.columns.view[pick]
    if problem.paired:
        column_id, column_view = column_id[:, None], column_view[:, None]
    same = id_n1 == column_id
    itself = same & (view_n1 == column_view)
    positives, absent = [same & ~itself], [itself]
    n, nobody = id_n1.shape[0], torch.zeros((), dtype=torch.bool, device=id_n1.device)
    for features, ids, size in (
        (problem.negatives, problem.negative_id, 0),
        (problem.own, None if problem.own_id is None else problem.own_id[rows], 1),
    ):
        if features is not None:
            width = features.shape[size]
            positives.append(nobody.expand(n, width))
            absent.append(nobody.expand(n, width) if ids is None else id_n1 == ids)
    positive_nC, absent_nC = torch.cat(positives, 1), torch.cat(absent, 1)
    if problem.positive is not None:  # an explicit positive wins over the ids
        positive_nC = _take(problem.positive, rows).expand_as(absent_nC)
        absent_nC = absent_nC & ~positive_nC
    if problem.ignore is not None:  # and an explicit ignore over everything
        absent_nC = absent_nC | _take(problem.ignore, rows)
    return positive_nC & ~absent_nC, ~positive_nC & ~absent_nC


@torch.no_grad()
def _statistics(
    similarity_nC: Tensor, tile: Tile, loss_n: Tensor, counted_n: Tensor, weight_n: Tensor | None
) -> Tensor:
    """Sums over this block, in the order of the constants above; float64 where the device has it."""
    dtype = torch.float32 if loss_n.device.type == "mps" else torch.float64
    positive, negative = tile.positive, tile.negative
    low = -torch.inf
    positives_n, negatives_n = positive.sum(1), negative.sum(1)
    judged_n = counted_n & (positives_n > 0) & (negatives_n > 0)
    if similarity_nC.shape[1] and similarity_nC.shape[0]:
        best_n = similarity_nC.masked_fill(~positive, low).amax(1)
        correct_n = best_n > similarity_nC.masked_fill(~negative, low).amax(1)  # a tie is not a hit
    else:
        correct_n = judged_n
    candidates_n = (positives_n + negatives_n).clamp(min=1).to(dtype)
    information_n = candidates_n.log() - loss_n.to(dtype)
    kept_n = counted_n.to(dtype)
    sums = [
        kept_n.sum() if weight_n is None else (kept_n * weight_n.to(dtype)).sum(),
        kept_n.sum(),
        (~counted_n).sum(),
        (loss_n.to(dtype) * (kept_n if weight_n is None else kept_n * weight_n.to(dtype))).sum(),
        (information_n * kept_n).sum(),
        (counted_n & (positives_n != 1)).sum(),
        (candidates_n * kept_n).sum(),
        judged_n.sum(),
        (judged_n & correct_n).sum(),
        similarity_nC.masked_fill(~positive, 0.0).sum(dtype=dtype),
        positives_n.sum(),
        similarity_nC.masked_fill(~negative, 0.0).sum(dtype=dtype),
        negatives_n.sum(),
    ]
    return torch.stack([s.to(dtype) for s in sums])
