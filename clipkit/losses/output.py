"""What `contrast` returns, and how it is summed up from the rows of both directions and of all ranks.

Shapes: N = rows of q, m = rows of k, both of this rank; W = ranks.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import group_size, sum_over_group
from clipkit.losses import links

# What is summed over the rows of a direction, in this order, and over pairs.
_WEIGHT, _ROWS, _SKIPPED, _LOSS, _INFORMATION, _SEVERAL, _CANDIDATES, _JUDGED, _CORRECT = range(9)
_POSITIVES, _NEGATIVES = range(9, 11)


@dataclass(frozen=True)
class ContrastOutput:
    """What `contrast` returns. Statistics carry no gradient and are those of the whole group.

    Attributes:
        loss: scalar to differentiate. With a group: W × this rank's share of the global loss.
        value: scalar, the global loss without a gradient, the same on every rank: the number to log.
        per_row: (N,) loss of each row of q of this rank, 0 where `counted` is False; differentiable.
        counted: (N,) bool, the rows of q that enter the loss (with a softmax link: those with a positive).
        per_column: (M of this rank,) the same for the rows of k; None unless direction is "both".
        rows: how many rows count, over both directions.
        skipped: how many rows do not.
        candidates: mean number K of candidates of the rows that count, positives included.
        accuracy: share of the rows with a positive and a negative in which some positive scores strictly
            higher than every negative; nan without such rows, None for the link "align".
        positive_similarity: mean similarity of positive pairs, before scale and bias; nan if there are none.
        negative_similarity: the same of negative pairs.
    """

    loss: Tensor
    value: Tensor
    per_row: Tensor
    counted: Tensor
    per_column: Tensor | None
    rows: Tensor
    skipped: Tensor
    candidates: Tensor
    accuracy: Tensor | None
    positive_similarity: Tensor
    negative_similarity: Tensor
    _information: Tensor | None = field(repr=False)
    _several: Tensor = field(repr=False)
    _most: Tensor = field(repr=False)

    @property
    def mi_bound(self) -> Tensor | None:
        """Mean of log K − L in nats, a lower bound of the mutual information; None where it is not one.

        It is one for a softmax link whose denominator holds the positive, exactly one positive in each row,
        and negatives drawn from the marginal of k: one view, no own (hard) negatives, no `log_weight`,
        `log_noise` or `ignore`. It cannot exceed log K. With a queue it is an estimate with stale keys.

        References:
            van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 5;
            Poole et al. 2019, "On Variational Bounds of Mutual Information", eq. 10.
        """
        if self._information is None or bool(self._several > 0) or bool(self.rows == 0):
            return None
        return self._information

    @property
    def saturated(self) -> bool | None:
        """Whether the bound is at its limit log K (L < 0.05 log K): only more candidates could tell more.

        None where `mi_bound` is.
        """
        bound = self.mi_bound
        return None if bound is None else bool(bound > 0.95 * self._most)


class Direction(NamedTuple):
    """One direction's rows: loss (n,), which count (n,) bool, states (8, n), weights (n,) or None."""

    loss: Tensor
    counted: Tensor
    states: Tensor
    weight: Tensor | None


def _sums(rows: Direction, dtype: torch.dtype) -> Tensor:
    """(11,) in the order of the constants above."""
    positives, negatives = rows.states[links.COUNT_P], rows.states[links.COUNT_N]
    judged = rows.counted & (positives > 0) & (negatives > 0)
    right = rows.states[links.BEST_P] > rows.states[links.BEST_N]  # a tie is not a hit
    candidates = (positives + negatives).clamp(min=1).to(dtype)
    kept = rows.counted.to(dtype)
    weight = kept if rows.weight is None else kept * rows.weight.to(dtype)
    loss = rows.loss.detach().to(dtype)
    sums = [
        weight,
        kept,
        ~rows.counted,
        loss * weight,
        (candidates.log() - loss) * kept,
        rows.counted & (positives != 1),
        candidates * kept,
        judged,
        judged & right,
        positives,
        negatives,
    ]
    return torch.stack([x.sum(dtype=dtype) for x in sums])


@torch.no_grad()
def _mean(x: Tensor, over: Tensor, dtype: torch.dtype) -> Tensor:
    return (x / over).to(dtype)


def summarise(
    directions: list[Direction], similarity: Tensor, link: links.Link, bound: bool,
    group: dist.ProcessGroup | None,
) -> ContrastOutput:  # fmt: skip
    """Σ of this rank ÷ count of all ranks × W, averaged over the directions, and the statistics.

    Args:
        directions: rows of q, then rows of k where both directions count.
        similarity: (2,) sums of similarities over positive and over negative pairs of this rank's rows of q.
        link: the link.
        bound: whether log K − L may bound the mutual information, as far as the arguments tell.
        group: the ranks to sum over.
    """
    wide, dtype = similarity.dtype, directions[0].loss.dtype
    mine = torch.cat([*(_sums(rows, wide) for rows in directions), similarity])
    everyone = sum_over_group(mine, group)
    similarity, sums = everyone[-2:], everyone[:-2].view(len(directions), -1)
    counts = torch.where(sums[:, _WEIGHT] > 0, sums[:, _WEIGHT], torch.ones_like(sums[:, 0]))
    shares = []
    for rows, count in zip(directions, counts, strict=True):
        terms = rows.loss if rows.weight is None else rows.loss * rows.weight
        shares.append(terms.sum() * (group_size(group) / count).to(dtype))
    total = sums.sum(0)
    rows, candidates = total[_ROWS], _mean(total[_CANDIDATES], total[_ROWS], dtype)
    return ContrastOutput(
        loss=shares[0] if len(shares) == 1 else (shares[0] + shares[1]) / 2,
        value=(sums[:, _LOSS] / counts).mean().to(dtype),
        per_row=directions[0].loss,
        counted=directions[0].counted,
        per_column=directions[1].loss if len(directions) == 2 else None,
        rows=rows.long(),
        skipped=total[_SKIPPED].long(),
        candidates=candidates,
        accuracy=None if link == "align" else _mean(total[_CORRECT], total[_JUDGED], dtype),
        positive_similarity=_mean(similarity[0], sums[0, _POSITIVES], dtype),
        negative_similarity=_mean(similarity[1], sums[0, _NEGATIVES], dtype),
        _information=_mean(total[_INFORMATION], rows, dtype) if bound else None,
        _several=total[_SEVERAL],
        _most=candidates.log(),
    )
