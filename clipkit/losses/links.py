"""How one row of scores becomes one number: the six links.

Every link is a pure function of a tile of scores (rows × all candidates of these rows) and two masks that
say which candidates are positives and which are negatives (what is in neither mask does not exist). It
returns the loss of each row and whether the row counts; it knows nothing of ids, batches or ranks. Rows
that do not count have loss 0 and gradient 0, never NaN.

Shapes: n = rows of the tile, C = candidates.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Link = Literal["softmax", "logistic", "nce", "hinge", "pair", "align"]
Denominator = Literal["all", "one", "neg"]
Aggregate = Literal["out", "in"]


@dataclass(frozen=True)
class Rule:
    """Which reduction, with its options; `single` promises at most one positive in each row."""

    link: Link = "softmax"
    denominator: Denominator = "all"
    aggregate: Aggregate = "out"
    margin: float = 0.0
    single: bool = False


@dataclass(frozen=True)
class Tile:
    """Scores of n rows against their C candidates, and what each candidate is to its row."""

    score: Tensor  # (n, C), as the masks
    positive: Tensor
    negative: Tensor
    log_weight: Tensor | None = None  # broadcasts to (n, C); weighs negatives only


def reduce_rows(tile: Tile, rule: Rule) -> tuple[Tensor, Tensor]:
    """Loss (n,) and validity (n,) bool of the rows of a tile."""
    if rule.link == "softmax":
        loss_n, counted_n = _softmax(tile, rule)
    elif rule.link in ("logistic", "nce"):
        loss_n, counted_n = _logistic(tile)
    elif rule.link == "hinge":
        loss_n, counted_n = _hinge(tile, rule)
    elif rule.link == "pair":
        loss_n, counted_n = _pair(tile, rule)
    else:
        loss_n, counted_n = _align(tile)
    return torch.where(counted_n, loss_n, torch.zeros_like(loss_n)), counted_n


def _log_sum_exp(x_nC: Tensor, mask_nC: Tensor, empty: float) -> Tensor:
    """Log-sum-exp over the masked candidates; `empty`, without a gradient, for rows that have none."""
    some_n = mask_nC.any(1)
    filled = x_nC.masked_fill(~mask_nC, -math.inf).masked_fill(~some_n[:, None], 0.0)
    lse_n = torch.logsumexp(filled, 1)
    return torch.where(some_n, lse_n, torch.full_like(lse_n, empty))


def _mean_over(x_nC: Tensor, mask_nC: Tensor) -> Tensor:
    total_n = torch.where(mask_nC, x_nC, torch.zeros_like(x_nC)).sum(1)
    return total_n / mask_nC.sum(1).clamp(min=1)


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus turns linear above 20, an error float64 can see


def _softmax(tile: Tile, rule: Rule) -> tuple[Tensor, Tensor]:
    """−mean_p (s_p − LSE_D(p)) ("out"), or −log mean_p exp(s_p − LSE_D(p)) ("in").

    With a single positive the loss is softplus(LSE_N − s_p), which keeps its relative precision when the
    positive wins by far; LSE_D − s_p would cancel to 0 there.
    """
    s, positive, negative = tile.score, tile.positive, tile.negative
    weighted = s if tile.log_weight is None else s + tile.log_weight
    if tile.log_weight is not None:
        negative = negative & (tile.log_weight > -math.inf)  # weight 0: not a candidate
    counted_n = positive.any(1)
    mean_n = _mean_over(s, positive)
    if rule.denominator == "neg":
        counted_n = counted_n & negative.any(1)
        lse_n = _log_sum_exp(weighted, negative, 0.0)
        if rule.aggregate == "out" or rule.single:
            return lse_n - mean_n, counted_n
        return lse_n - _log_mean_exp(s, positive), counted_n
    lse_n = _log_sum_exp(weighted, negative, -math.inf)
    if rule.single:
        return _softplus(lse_n - mean_n), counted_n
    if rule.denominator == "one":
        term_nC = _softplus(lse_n[:, None] - s)
        if rule.aggregate == "out":
            return _mean_over(term_nC, positive), counted_n
        return -_log_mean_exp(-term_nC, positive), counted_n
    only_one_n = _softplus(lse_n - mean_n)
    all_n = torch.logaddexp(lse_n, _log_sum_exp(s, positive, 0.0))
    many_n = all_n - (mean_n if rule.aggregate == "out" else _log_mean_exp(s, positive))
    return torch.where(positive.sum(1) == 1, only_one_n, many_n), counted_n


def _log_mean_exp(x_nC: Tensor, mask_nC: Tensor) -> Tensor:
    return _log_sum_exp(x_nC, mask_nC, 0.0) - mask_nC.sum(1).clamp(min=1).to(x_nC.dtype).log()


def _logistic(tile: Tile) -> tuple[Tensor, Tensor]:
    """Σ_p softplus(−s_p) + Σ_n w_n softplus(s_n). A row with negatives alone counts too."""
    usable = tile.positive | tile.negative
    term_nC = _softplus(torch.where(tile.positive, -tile.score, tile.score))
    if tile.log_weight is not None:
        weight = tile.log_weight.exp().expand_as(term_nC)
        term_nC = term_nC * torch.where(tile.positive, torch.ones_like(term_nC), weight)
    return torch.where(usable, term_nC, torch.zeros_like(term_nC)).sum(1), usable.any(1)


def _hinge(tile: Tile, rule: Rule) -> tuple[Tensor, Tensor]:
    """Mean over all (positive, negative) pairs of the row of max(0, margin − s_p + s_n).

    Positives are taken one rank at a time, so that memory stays n × C and not n × C × C.
    """
    s, positive, negative = tile.score, tile.positive, tile.negative
    counted_n = positive.any(1) & negative.any(1)
    most = min(1, s.shape[1]) if rule.single else int(positive.sum(1).max().item()) if s.shape[0] else 0
    exists_nP, where_nP = positive.to(torch.uint8).topk(most, dim=1)
    total_n = s.sum(1) * 0.0
    for rank in range(most):
        best = s.gather(1, where_nP[:, rank : rank + 1])
        pair_nC = (rule.margin - best + s).clamp(min=0.0)
        keep = negative & exists_nP[:, rank : rank + 1].bool()
        total_n = total_n + torch.where(keep, pair_nC, torch.zeros_like(s)).sum(1)
    return total_n / (positive.sum(1) * negative.sum(1)).clamp(min=1), counted_n


def _pair(tile: Tile, rule: Rule) -> tuple[Tensor, Tensor]:
    """Mean over the row's candidates of d² (positives) and max(0, margin − d)² (negatives), with d = −s."""
    usable = tile.positive | tile.negative
    distance_nC = -tile.score
    apart_nC = (rule.margin - distance_nC).clamp(min=0.0)
    term_nC = torch.where(tile.positive, distance_nC, apart_nC).square()
    return _mean_over(term_nC, usable), usable.any(1)


def _align(tile: Tile) -> tuple[Tensor, Tensor]:
    """Mean over the row's positives of 2 − 2 s; negatives play no part."""
    return _mean_over(2.0 - 2.0 * tile.score, tile.positive), tile.positive.any(1)
