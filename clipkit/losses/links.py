"""How the scores of a row become its loss: the links, as sums that can be taken tile by tile.

Every streaming link has three parts. `bulk` and `positives` turn a tile of scores into a state, a few numbers
for each row (and for each column); states of different tiles, candidates or ranks are joined by `merge`.
`finish` turns the state of a row that has seen all of its candidates into its loss. `bulk_slope` and
`positive_slope` give dL/ds for a tile that is scored again. A tile tells negatives from the few others by
index: what is a positive or left out stands in the tile as −inf, where every link's bulk is zero, and
positives are handed over as a list. Nothing here knows of ids, batches or ranks.

Shapes: n = rows of a tile, c = its columns, E = positives in it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.space import FRESH, Space

Link = Literal["softmax", "logistic", "nce", "hinge", "pair", "align"]
Denominator = Literal["all", "one", "neg"]
Aggregate = Literal["out", "in"]

# The rows of a state (8, n): log-sum-exp and largest score of negatives and of positives, sum of the scores
# of positives, how many positives and negatives there are, and what a link simply sums.
LSE_N, LSE_P, BEST_N, BEST_P, SCORE_P, COUNT_P, COUNT_N, TOTAL = range(8)
# The rows of what `finish` leaves for the slopes (5, n).
REFERENCE, POSITIVES, SHARE, INVERSE, UPSTREAM = range(5)
_SPREAD = 60.0  # e^-60 is a normal float32, and what is lost below it weighs less than 1e-11


@dataclass(frozen=True)
class Rule:
    """Which reduction, with its options; `single` promises at most one positive in each row."""

    link: Link = "softmax"
    denominator: Denominator = "all"
    aggregate: Aggregate = "out"
    margin: float = 0.0
    single: bool = False

    @property
    def whole_rows(self) -> bool:
        """Whether a row's loss needs all of its scores at once (`whole_rows`), so that no sum will do."""
        return self.link == "hinge" or (
            self.link == "softmax" and self.denominator == "one" and not self.single
        )

    @property
    def logistic(self) -> bool:
        return self.link in ("logistic", "nce")


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40.0)  # linear where even float64 cannot see the difference


def empty_state(n: int, like: Tensor) -> Tensor:
    """The state (8, n) of rows that have seen no candidate."""
    state = like.new_zeros(8, n)
    state[LSE_N : BEST_P + 1] = -math.inf
    return state


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The state of rows whose candidates were seen in two parts."""
    joined = [torch.logaddexp(a[:BEST_N], b[:BEST_N]), torch.maximum(a[BEST_N:SCORE_P], b[BEST_N:SCORE_P])]
    return torch.cat([*joined, a[SCORE_P:] + b[SCORE_P:]])


def log_sum_exp(x: Tensor, high: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """log Σ e^x along `dim`, given the maxima `high`; −inf where all are. Writes e^(x − high) to `out`."""
    known = torch.where(high.isinf(), torch.zeros_like(high), high).unsqueeze(dim)
    return torch.sub(x, known, out=out).exp_().sum(dim).log_() + known.squeeze(dim)


def _log_sum_exps(x: Tensor, rows: Tensor, columns: Tensor, free: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of all rows and of all columns from one e^x, where its range allows that."""
    if x.device.type == "cpu":  # elsewhere the question would wait for the device
        high = rows.max()
        if float(high - torch.minimum(rows.min(), columns.min())) <= _SPREAD:
            e = torch.sub(x, high, out=x if free else None).exp_()
            return e.sum(1).log_() + high, e.sum(0).log_() + high
    return log_sum_exp(x, rows, 1), log_sum_exp(x, columns, 0, x if free else None)


def bulk(
    score: Tensor, log_weight: Tensor | None, rule: Rule, both: bool, free: bool
) -> tuple[Tensor, Tensor | None]:
    """What the negatives of a tile add to the states of its rows (8, n), and of its columns (8, c).

    Args:
        score: (n, c), −inf where there is no negative.
        log_weight: log-weights of the negatives, broadcasting to (n, c).
        rule: the reduction.
        both: whether the columns' states are wanted.
        free: whether `score` may be overwritten.
    """
    (n, c), dims = score.shape, (1, 0) if both else (1,)
    states = [empty_state(size, score) for size in ((n, c) if both else (n,))]
    if n == 0 or c == 0:
        return states[0], states[1] if both else None
    for state, dim in zip(states, dims, strict=True):
        state[BEST_N] = score.amax(dim)
    if rule.link == "softmax":
        highs = [state[BEST_N] for state in states]
        if log_weight is not None:
            score, free = score + log_weight, True
            highs = [score.amax(dim) for dim in dims]
        if both:
            states[0][LSE_N], states[1][LSE_N] = _log_sum_exps(score, highs[0], highs[1], free)
        else:
            states[0][LSE_N] = log_sum_exp(score, highs[0], 1, score if free else None)
    elif rule.logistic or rule.link == "pair":
        term = softplus(score) if rule.logistic else (score + rule.margin).clamp_(min=0.0).square_()
        if log_weight is not None:
            term *= log_weight.exp()
        for state, dim in zip(states, dims, strict=True):
            state[TOTAL] = term.sum(dim)
    return states[0], states[1] if both else None


def positives(score_E: Tensor, index_E: Tensor, n: int, rule: Rule) -> Tensor:
    """What a list of positives adds to the states (8, n) of the rows, or columns, `index_E`."""
    state = empty_state(n, score_E)
    best = state[BEST_P].scatter_reduce_(0, index_E, score_E, "amax")
    state[SCORE_P].index_add_(0, index_E, score_E)
    state[COUNT_P].index_add_(0, index_E, torch.ones_like(score_E))
    if rule.link == "softmax":
        total = torch.zeros_like(best).index_add_(0, index_E, (score_E - best[index_E]).exp())
        state[LSE_P] = best + total.log()
        return state
    term = softplus(-score_E) if rule.logistic else score_E.square()
    if rule.link == "align":
        term = 2.0 - 2.0 * score_E
    if rule.link != "hinge":
        state[TOTAL].index_add_(0, index_E, term)
    return state


def finish(state: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (n,), whether the row counts (n,) bool, and what the slopes need (5, n), UPSTREAM still 1.

    A row without what its link compares counts nothing: loss 0 and slope 0.
    """
    lse_n, lse_p, count_p, count_n = state[LSE_N], state[LSE_P], state[COUNT_P], state[COUNT_N]
    inverse = count_p.clamp(min=1).reciprocal()
    counted = count_p > 0
    need = torch.zeros_like(state[: UPSTREAM + 1])
    if rule.whole_rows:
        loss = state[TOTAL]
        counted = counted & (count_n > 0) if rule.link == "hinge" else counted
    elif rule.link == "softmax":
        only = rule.denominator == "neg"
        counted = counted & (count_n > 0) if only else counted
        base = lse_n - lse_p if only else softplus(lse_n - lse_p)
        loss = base + (lse_p - state[SCORE_P] * inverse if rule.aggregate == "out" else count_p.log())
        need[REFERENCE] = lse_n if only else torch.logaddexp(lse_n, lse_p)
        need[POSITIVES] = lse_p
        need[SHARE] = 1.0 if only else torch.sigmoid(lse_n - lse_p)
    elif rule.link == "align":
        loss = state[TOTAL] * inverse
    else:
        counted = count_p + count_n > 0
        loss = state[TOTAL]
        if rule.link == "pair":
            inverse = (count_p + count_n).clamp(min=1).reciprocal()
            loss = loss * inverse
    need[INVERSE], need[UPSTREAM] = inverse, 1.0
    need[UPSTREAM] *= counted
    return torch.where(counted, loss, torch.zeros_like(loss)), counted, need.masked_fill_(need.isinf(), 0.0)


def bulk_slope(
    score: Tensor, log_weight: Tensor | None, rule: Rule, rows: Tensor, columns: Tensor | None, free: bool,
    space: Space = FRESH,
) -> Tensor:  # fmt: skip
    """dL/ds of the negatives of a tile (n, c), 0 where `score` is −inf.

    Args:
        score: (n, c), as in `bulk`.
        log_weight: as in `bulk`.
        rule: the reduction.
        rows: (5, n), what `finish` left, with the rows' upstream gradient.
        columns: (5, c), the same of the columns, for both directions.
        free: whether `score` may be overwritten.
        space: where what is returned, and what is needed in between, may stand.
    """
    out = score if free else space.take("slope", tuple(score.shape), score.dtype, score)
    if rule.link == "softmax":
        return _softmax_slope(score if log_weight is None else score + log_weight, rows, columns, out, space)
    if rule.link == "align":
        return out.zero_()
    up = rows[UPSTREAM, :, None]
    if rule.link == "pair":
        up = up * rows[INVERSE, :, None]
        if columns is not None:
            up = up + columns[UPSTREAM] * columns[INVERSE]
        return torch.add(score, rule.margin, out=out).clamp_(min=0.0).mul_(2.0 * up)
    slope = torch.sigmoid(score, out=out).mul_(up if columns is None else up + columns[UPSTREAM])
    return slope if log_weight is None else slope.mul_(log_weight.exp())


def _softmax_slope(score: Tensor, rows: Tensor, columns: Tensor | None, out: Tensor, space: Space) -> Tensor:
    """g_i e^(s − R_i), plus g_j e^(s − R_j): from one exponential where the range of the R allows that."""
    reference, up = rows[REFERENCE], rows[UPSTREAM]
    if columns is None:
        return torch.sub(score, reference[:, None], out=out).exp_().mul_(up[:, None])
    spare = space.take("spare", tuple(score.shape), score.dtype, score)
    if score.device.type == "cpu" and score.numel():
        high, low = reference.max(), torch.minimum(reference.min(), columns[REFERENCE].min())
        if float(high - low) <= _SPREAD:
            u, v = up * (high - reference).exp(), columns[UPSTREAM] * (high - columns[REFERENCE]).exp()
            both = torch.add(u[:, None], v, out=spare)
            return torch.sub(score, high, out=out).exp_().mul_(both)
    second = torch.sub(score, columns[REFERENCE], out=spare).exp_().mul_(columns[UPSTREAM])
    return torch.sub(score, reference[:, None], out=out).exp_().mul_(up[:, None]).add_(second)


def positive_slope(score_E: Tensor, need: Tensor, rule: Rule) -> Tensor:
    """dL/ds (E,) of positives, given what `finish` left for the row, or column, of each (5, E).

    For a softmax link: p − σ p − 1/|P| ("out") or −σ p ("in"), where p is the share of the positive among the
    positives and σ that of the negatives in the denominator; with one positive −σ, without a cancellation.
    """
    inverse = need[INVERSE]
    if rule.link == "softmax":
        among = (score_E - need[POSITIVES]).exp()
        slope = -need[SHARE] * among
        if rule.aggregate == "out":
            slope = torch.where(inverse == 1, -need[SHARE], among + slope - inverse)
    elif rule.logistic:
        slope = -torch.sigmoid(-score_E)
    else:
        slope = 2.0 * score_E * inverse if rule.link == "pair" else -2.0 * inverse
    return slope * need[UPSTREAM]


def weight_slope(score: Tensor, slope: Tensor, rule: Rule) -> Tensor:
    """dL/d log_weight of the negatives of a tile (n, c), given their scores and dL/ds."""
    if rule.link == "softmax":
        return slope
    share = score.sigmoid()  # the slope of softplus, whose value is wanted
    return torch.where(share > 0, slope / share * softplus(score), torch.zeros_like(slope))
