"""Links whose rows cannot be summed up tile by tile: hinge, and softmax with one positive at a time.

Every positive of a row meets every negative in the hinge, and the log-sum-exp of all negatives in
`denominator="one"`, so a tile here is a strip: some rows with all of their candidates. A row's P·Q hinge
terms are never formed: with both sorted, a positive needs only how many negatives lie within the margin and
their sum, which takes C log C operations for any number of positives.

Shapes: n = rows of a strip, C = all candidates, E = positives in it, P = most positives of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.losses import links
from clipkit.losses.links import Rule, log_sum_exp, positives, softplus
from clipkit.losses.problem import Gradients, wide
from clipkit.losses.tiles import Rows


@dataclass(frozen=True)
class _Strip:
    """Scores (n, C), −inf where there is no negative; the positives: row, column and score, (E,) each."""

    score: Tensor
    row: Tensor
    column: Tensor
    listed: Tensor


def _strip(rows: Rows) -> tuple[_Strip, list[Tensor], Tensor]:
    """The strip, the candidates' features, and the sums (2,) of `Rows.tile`."""
    scores, found, features, sums = [], [], [], []
    for block in rows.problem.candidates:
        features.append(rows.features(block, block.whole))
        tile, seen = rows.tile(block, block.whole, features[-1])
        weight, pick = rows.log_weight(block.at(block.whole)), tile.positive
        scores.append(tile.score if weight is None else tile.score + weight)
        found.append((tile.row[pick], tile.column[pick] + block.start, tile.listed[pick]))
        sums.append(seen)
    row, column, listed = (torch.cat(x) for x in zip(*found, strict=True))
    return _Strip(torch.cat(scores, 1), row, column, listed), features, torch.stack(sums).sum(0)


def _reduced(strip: _Strip, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """States (8, n), and slopes (n, C) of negatives and (E,) of positives."""
    state = positives(strip.listed, strip.row, strip.score.shape[0], Rule("hinge"))
    state[links.BEST_N] = strip.score.amax(1) if strip.score.shape[1] else -torch.inf
    state[links.COUNT_N] = (strip.score > -torch.inf).sum(1)
    state[links.TOTAL], slope, there = (_hinge if rule.link == "hinge" else _one)(strip, state, rule)
    return state, slope, there


def states(rows: Rows) -> tuple[Tensor, Tensor]:
    """The finished states (8, n) of a strip, with the loss in TOTAL; and the sums (2,) of `Rows.tile`."""
    strip, _, sums = _strip(rows)
    return _reduced(strip, rows.problem.rule)[0], sums


def push(rows: Rows, need: Tensor, into: Gradients) -> None:
    """Add the gradients of a strip, given what `links.finish` left of its rows (5, n)."""
    strip, features, _ = _strip(rows)
    everything = slice(0, strip.score.shape[1])
    _, slope, there = _reduced(strip, rows.problem.rule)
    slope *= need[links.UPSTREAM, :, None]
    into.add("log_weight", slope, rows.at, everything)
    slope[strip.row, strip.column] = there * need[links.UPSTREAM, strip.row]
    into.add("log_noise", slope.neg(), rows.at, everything)
    for number, (block, k) in enumerate(zip(rows.problem.candidates, features, strict=True)):
        rows.push(number, block.whole, k, slope[:, block.at(block.whole)], into)


def _hinge(strip: _Strip, counts: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the row's pairs of max(0, margin − s_p + s_n): loss (n,), slopes (n, C) and (E,)."""
    score, rank = strip.score, _rank(strip.row, strip.score.shape[0])
    pairs = (counts[links.COUNT_P] * counts[links.COUNT_N]).clamp(min=1)
    most = int(counts[links.COUNT_P].max()) if strip.listed.numel() else 1
    mine_nP = torch.full((score.shape[0], most), torch.inf, dtype=score.dtype, device=score.device)
    mine_nP[strip.row, rank] = strip.listed
    ordered = score.sort(1).values
    below_nP = torch.searchsorted(ordered, mine_nP - rule.margin, right=True)
    within_nP = score.shape[1] - below_nP
    total = ordered.masked_fill(ordered.isinf(), 0.0).to(wide(score)).cumsum(1)
    total = torch.cat([torch.zeros_like(total[:, :1]), total], 1)
    above_nP = total[:, -1:] - total.gather(1, below_nP)
    terms_nP = torch.where(mine_nP.isinf(), 0.0, within_nP * (rule.margin - mine_nP) + above_nP)
    loss = (terms_nP.sum(1) / pairs).to(score.dtype)
    slope = torch.searchsorted(mine_nP.sort(1).values, score + rule.margin) / pairs[:, None]
    return loss, slope.to(score.dtype), -(within_nP / pairs[:, None])[strip.row, rank].to(score.dtype)


def _rank(row_E: Tensor, n: int) -> Tensor:
    """For each list entry (E,), how many before it have the same row."""
    order = row_E.argsort(stable=True)
    counts = torch.bincount(row_E, minlength=n)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(row_E)
    rank[order] = torch.arange(row_E.numel(), device=row_E.device) - first[row_E[order]]
    return rank


def _one(strip: _Strip, counts: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax of each positive against the negatives alone: loss (n,), slopes (n, C) and (E,)."""
    n, inverse = strip.score.shape[0], counts[links.COUNT_P].clamp(min=1).reciprocal()
    high = strip.score.amax(1) if strip.score.shape[1] else strip.score.new_full((n,), -torch.inf)
    lse = log_sum_exp(strip.score, high, 1)
    behind = lse[strip.row] - strip.listed
    log_p, wrong = -softplus(behind), torch.sigmoid(behind)
    seen = positives(log_p, strip.row, n, Rule("softmax"))
    if rule.aggregate == "out":
        loss, there = -seen[links.SCORE_P] * inverse, -wrong * inverse[strip.row]
    else:
        loss = counts[links.COUNT_P].log() - seen[links.LSE_P]
        there = -wrong * (log_p - seen[links.LSE_P][strip.row]).exp()
    pull = torch.zeros_like(lse).index_add_(0, strip.row, -there)
    known = lse.masked_fill(lse.isinf(), 0.0)
    return loss, (strip.score - known[:, None]).exp_().mul_(pull[:, None]), there
