"""`contrast()`: the one primitive under every loss of this package.

Rows q are scored against candidates k; a candidate is a positive when its id is the row's id, and is the
row itself, and so masked, when the view is the same too. A link turns a row's scores into its loss. With a
process group the candidates of all ranks are gathered, ids and views along with the features, so no offset
or mask can go wrong. `prepare` checks and gathers, `tiles` evaluates, `links` reduces.

Shapes: N = rows of q, M = rows of k (over the whole group where one is given), K = shared negatives,
m = own negatives of a row, C = M + K + m candidates of a row, D = features, W = ranks.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import group_rank
from clipkit.errors import InputError
from clipkit.losses import checks, prepare
from clipkit.losses.checks import Scalar
from clipkit.losses.engine import Exchange, Leaves, Task
from clipkit.losses.links import Aggregate, Denominator, Link, Rule
from clipkit.losses.node import solve
from clipkit.losses.output import ContrastOutput, Direction, summarise
from clipkit.losses.problem import Similarity
from clipkit.losses.similarity import widen


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
    direction: Literal["one", "both"] = "one",
    similarity: Similarity = "cosine",
    block: int | None = None,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "gather",
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
        block: score so many rows and candidates at a time, again in backward; None: as many as fit a budget
            of memory, and where all do, without scoring again.
        group: the candidates k of all these ranks, exactly; local batches may differ in size.
        exchange: "gather" brings all of k to every rank; "ring" passes it round, so that a rank holds two
            ranks' share at a time: for sides too big to gather, with the same numbers. Links that need whole
            rows (hinge; softmax with denominator "one" and several positives) gather all the same.

    Returns:
        `ContrastOutput`. With a group, the mean over the ranks of every parameter's gradient (what DDP
        does) is the gradient that one process with the whole batch has.

    Raises:
        InputError: an argument has the wrong shape, dtype or value, or does not go with another one; or,
            in backward, the loss is differentiated twice.

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
    checks.one_of("exchange", exchange, ("gather", "ring"))
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise InputError(f"block must be an integer >= 1, got {block!r}")
    like = torch.empty(0, dtype=torch.promote_types(widen(q).dtype, widen(k).dtype), device=q.device)
    leaves = Leaves(
        q, k, negatives, own_negatives,
        checks.scalar("scale", scale, like, above=0.0), checks.scalar("bias", bias, like), None, None,
    )  # fmt: skip
    rows, columns, single = prepare.sides(q, k, (q_id, k_id), (q_view, k_view), positive, group)
    rule = replace(rule, single=single or (paired and positive is None))
    together = None if paired else group
    sizes = [[q.shape[0]], [k.shape[0]]] if together is None else prepare.agreed(q, k, exchange, together)
    column_id, column_view = prepare.identities(columns, sizes[1], together)
    task = Task(
        rows.id, rows.view, column_id, column_view, sizes[1], rule, similarity, paired,
        both=direction == "both" and not rule.whole_rows, block=block, group=group, exchange=exchange,
    )  # fmt: skip
    task = prepare.with_negatives(task, leaves, negative_id, own_negative_id)
    task, leaves = prepare.with_pairs(task, leaves, positive, ignore, log_noise, log_weight)
    weight = prepare.weights(weight, like, q.shape[0], k.shape[0] if direction == "both" else None)
    found = solve(task, leaves)
    directions = [Direction(found.loss, found.counted, found.states, weight)]
    if found.column_loss is not None:
        directions.append(Direction(*found[4:7], weight))  # pyright: ignore[reportArgumentType]
    elif direction == "both":
        other = solve(*prepare.reverse(task, leaves, columns, sizes[0]))
        directions.append(Direction(other.loss, other.counted, other.states, weight))
    bound = _may_bound(rule, q_view, k_view, own_negatives, ignore, log_noise, log_weight)
    return summarise(directions, found.sums / leaves.scale.detach(), link, bound, group)


def _may_bound(rule: Rule, q_view: Any, k_view: Any, *others: Any) -> bool:
    """Whether log K − L bounds the mutual information, as far as the arguments tell."""
    one_view = not isinstance(q_view, Tensor) and not isinstance(k_view, Tensor)
    return (
        rule.link == "softmax" and rule.denominator != "neg" and one_view and all(x is None for x in others)
    )
