"""`contrast()`: the one primitive under every loss of this package.

Rows q are scored against candidates k; a candidate is a positive when its id is the row's id, and is the
row itself, and so masked, when the view is the same too. A link turns a row's scores into its loss. With a
process group the candidates of all ranks are gathered, ids and views along with the features, so no offset
or mask can go wrong. `prepare` checks and gathers, `tiles` evaluates, `links` reduces.

Shapes: N = rows of q, M = rows of k (over the whole group where one is given), K = shared negatives,
m = own negatives of a row, C = M + K + m candidates of a row, D = features, W = ranks.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import group_rank, group_size, sum_over_group
from clipkit.errors import InputError
from clipkit.losses import checks, prepare, tiles
from clipkit.losses.checks import Scalar
from clipkit.losses.links import Aggregate, Denominator, Link, Rule
from clipkit.losses.prepare import Direction
from clipkit.losses.similarity import full_precision, widen
from clipkit.losses.tiles import Problem, Similarity, Solution, solve


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
        accuracy: share of the rows with a positive and a negative in which some positive is strictly more
            similar than every negative; nan without such rows, None for the link "align".
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


def contrast(
    q: Tensor,
    k: Tensor,
    *,
    q_id: Tensor | None = None,
    k_id: Tensor | None = None,
    q_view: int | Tensor = 0,
    k_view: int | Tensor = 1,
    paired: bool = False,
    negatives: Tensor | None = None,
    negative_id: Tensor | None = None,
    own_negatives: Tensor | None = None,
    own_negative_id: Tensor | None = None,
    positive: Tensor | None = None,
    ignore: Tensor | None = None,
    scale: Scalar = 1.0,
    bias: Scalar = 0.0,
    log_noise: Scalar | None = None,
    log_weight: Scalar | None = None,
    weight: Tensor | None = None,
    link: Link = "softmax",
    denominator: Denominator = "all",
    aggregate: Aggregate = "out",
    margin: float | None = None,
    direction: Direction = "one",
    similarity: Similarity = "cosine",
    block: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> ContrastOutput:
    """Score rows of q against candidates and reduce every row with a link.

        s_ij = scale · sim(q_i, c_j) + bias − log_noise_j        loss = Σ_i w_i L_i / Σ_i w_i

    | link | L_i over positives P and negatives Q of row i |
    |---|---|
    | softmax, "out" | −mean_p (s_p − log Σ_{j∈D(p)} e^{s_j}), negatives weighed by e^{log_weight} |
    | softmax, "in" | −log mean_p exp(s_p − log Σ_{j∈D(p)} e^{s_j}) |
    | logistic, nce | Σ_p log(1 + e^{−s_p}) + Σ_{n∈Q} e^{log_weight_n} log(1 + e^{s_n}) |
    | hinge | mean over p, n of max(0, margin − s_p + s_n) |
    | pair | mean over P and Q of d² (P) or max(0, margin − d)² (Q), d the euclidean distance |
    | align | mean_p (2 − 2 s_p) |

    D(p) is P ∪ Q ("all"), {p} ∪ Q ("one") or Q ("neg": then no bound on mutual information, and L_i may be
    negative). Everything is float32 (float64 if an input is), also under autocast.

    Args:
        q: (N, D) rows, floating.
        k: (M, D) candidates of every row; with `paired`, (N, D): row i meets k_i alone.
        q_id, k_id: (N,), (M,) integers; equal ids make a positive pair. Default: row i belongs to k_i. k_id
            defaults to q_id. Ids are compared over the whole group.
        q_view, k_view: int or (N,), (M,) integers; equal id *and* view is the row itself, which is left out.
        paired: row i meets only k_i (and the negatives), not the rest of k.
        negatives: (K, D) candidates of every row that are never positives (a queue, a bank); not gathered.
        negative_id: (K,) their ids: one with the row's own id is left out instead of being a negative.
        own_negatives: (N, m, D) negatives of each row alone.
        own_negative_id: (N, m) their ids, as `negative_id`.
        positive: bool, broadcasts to (N, C); replaces the rule by ids.
        ignore: bool, broadcasts to (N, C); pairs that take no part.
        scale: 1/τ > 0, number or tensor with its exact gradient.
        bias: number or tensor, e.g. SigLIP's b, or −log Z of an NCE model.
        log_noise: number or tensor broadcast to (N, C), subtracted from the scores: log(m · p_noise) for the
            link nce, log of the sampling probability for a sampled softmax.
        log_weight: number or tensor broadcast to (N, C): a negative counts as e^{log_weight} negatives.
        weight: (N,) weights ≥ 0 of the rows; for "both" row i of k gets the weight of row i of q.
        link, denominator, aggregate: see the tables above.
        margin: ≥ 0, for the links hinge and pair.
        direction: "one": rows of q; "both": the mean of that and of rows of k against candidates q.
        similarity: "cosine", "inner_product" or "euclidean" (which scores with minus the distance).
        block: evaluate so many rows at a time, recomputing them in backward; None: chosen from the memory.
        group: gather k (for "both" also q) over these ranks, exactly; local batches may differ in size.

    Returns:
        `ContrastOutput`. With a group, the mean over the ranks of every parameter's gradient (what DDP
        does) is the gradient that one process with the whole batch has.

    Raises:
        InputError: an argument has the wrong shape, dtype or value, or does not go with another one.

    References:
        Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2 ("out") and 3 ("in"); van den Oord et
        al. 2018; Zhai et al. 2023; Gutmann & Hyvärinen 2010; Schroff et al. 2015; Hadsell et al. 2006;
        Grill et al. 2020.
    """
    group_rank(group)  # refuses a process outside of the group, before the others wait for it
    checks.features("q", q)
    checks.features("k", k)
    checks.fits("q", q, "k", k)
    if group is None:
        checks.not_empty("q", q)
        checks.not_empty("k", k)
    if paired:
        checks.same_shape(q=q, k=k)
    rule = prepare.rule(link, denominator, aggregate, margin, similarity, log_noise, log_weight)
    if direction == "both" and (paired or negatives is not None or own_negatives is not None):
        raise InputError(
            "direction='both' takes in-batch candidates only; with paired or with negatives call contrast "
            "once for each direction"
        )
    checks.one_of("direction", direction, ("one", "both"))
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise InputError(f"block must be an integer >= 1, got {block!r}")
    with full_precision(q):
        rows, columns, single = prepare.sides(q, k, (q_id, k_id), (q_view, k_view), positive, group)
        rule = replace(rule, single=single or (paired and positive is None))
        dtype = torch.promote_types(widen(q).dtype, widen(k).dtype)
        rows, columns, all_rows, all_columns = prepare.gathered(
            rows, columns, dtype, direction, paired, group
        )
        if similarity == "cosine":
            rows, all_columns = prepare.normalised(rows), prepare.normalised(all_columns)
        like = rows.features
        problem = Problem(
            rows, all_columns, paired, similarity,
            checks.scalar("scale", scale, like, above=0.0), checks.scalar("bias", bias, like), rule,
        )  # fmt: skip
        problem = prepare.with_negatives(problem, negatives, negative_id, own_negatives, own_negative_id)
        problem = prepare.with_pairs(problem, positive, ignore, log_noise, log_weight, weight)
        problems = [problem]
        if direction == "both":
            problems.append(prepare.reverse(problem, columns, all_rows, group))
        solutions = [solve(p, block) for p in problems]
    bound = _may_bound(rule, q_view, k_view, own_negatives, ignore, log_noise, log_weight)
    return _output(problems, solutions, bound, group)


def _may_bound(rule: Rule, q_view: Any, k_view: Any, *others: Any) -> bool:
    """Whether log K − L bounds the mutual information, as far as the arguments tell."""
    one_view = not isinstance(q_view, Tensor) and not isinstance(k_view, Tensor)
    return (
        rule.link == "softmax" and rule.denominator != "neg" and one_view and all(x is None for x in others)
    )


def _output(
    problems: list[Problem], solutions: list[Solution], bound: bool, group: dist.ProcessGroup | None
) -> ContrastOutput:
    """Σ of this rank ÷ count of all ranks × W, averaged over the directions, and the statistics."""
    sums = sum_over_group(torch.stack([s.sums for s in solutions]), group)
    dtype, directions = solutions[0].loss.dtype, len(solutions)
    counts = torch.where(sums[:, tiles.WEIGHT] > 0, sums[:, tiles.WEIGHT], torch.ones_like(sums[:, 0]))
    shares = []
    for problem, solution, count in zip(problems, solutions, counts, strict=True):
        terms = solution.loss if problem.weight is None else solution.loss * problem.weight
        shares.append(terms.sum() * (group_size(group) / count).to(dtype))
    total = sums.sum(0)

    def mean(of: int, over: int) -> Tensor:
        return (total[of] / total[over]).to(dtype)

    return ContrastOutput(
        loss=shares[0] if directions == 1 else (shares[0] + shares[1]) / 2,
        value=(sums[:, tiles.LOSS] / counts).mean().to(dtype),
        per_row=solutions[0].loss,
        counted=solutions[0].counted,
        per_column=solutions[1].loss if directions == 2 else None,
        rows=total[tiles.ROWS].long(),
        skipped=total[tiles.SKIPPED].long(),
        candidates=mean(tiles.CANDIDATES, tiles.ROWS),
        accuracy=None if problems[0].rule.link == "align" else mean(tiles.CORRECT, tiles.JUDGED),
        positive_similarity=mean(tiles.POSITIVE_SUM, tiles.POSITIVES),
        negative_similarity=mean(tiles.NEGATIVE_SUM, tiles.NEGATIVES),
        _information=mean(tiles.INFORMATION, tiles.ROWS) if bound else None,
        _several=total[tiles.SEVERAL],
    )
