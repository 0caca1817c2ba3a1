"""From the arguments of `contrast` to a checked `Problem`: rules, ids, gathering, negatives, pairs.

Each step takes what the caller gave, refuses what cannot be meant with an `InputError`, and returns the part
of the problem it is about. The only communication is in `gathered`: the sizes, then ids and views, then the
features with their gradient.

Shapes: as in `primitive`.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import exchange, gather_features, gather_rows, unique_ids
from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.losses.checks import Scalar
from clipkit.losses.links import Aggregate, Denominator, Link, Rule
from clipkit.losses.similarity import unit
from clipkit.losses.tiles import Problem, Side, Similarity

Direction = Literal["one", "both"]


def rule(
    link: Link, denominator: Denominator, aggregate: Aggregate, margin: float | None,
    similarity: Similarity, log_noise: Any, log_weight: Any,
) -> Rule:  # fmt: skip
    """The reduction, after refusing options that the link would not look at."""
    checks.one_of("link", link, ("softmax", "logistic", "nce", "hinge", "pair", "align"))
    checks.one_of("denominator", denominator, ("all", "one", "neg"))
    checks.one_of("aggregate", aggregate, ("out", "in"))
    checks.one_of("similarity", similarity, ("cosine", "inner_product", "euclidean"))
    if link != "softmax" and (denominator, aggregate) != ("all", "out"):
        raise InputError(f"denominator and aggregate belong to link='softmax', not to {link!r}")
    if (margin is None) == (link in ("hinge", "pair")):
        raise InputError("margin belongs to link='hinge' and link='pair': they need it and no other takes it")
    if link == "nce" and log_noise is None:
        raise InputError(
            "log_noise is needed by link='nce': log(number of noise samples × noise probability)"
        )
    if log_weight is not None and link not in ("softmax", "logistic", "nce"):
        raise InputError(f"log_weight belongs to the links softmax, logistic and nce, not to {link!r}")
    if link == "pair" and similarity != "euclidean":
        raise InputError(f"link='pair' needs similarity='euclidean', got {similarity!r}")
    if link == "align" and similarity != "cosine":
        raise InputError(f"link='align' needs similarity='cosine', got {similarity!r}")
    return Rule(link, denominator, aggregate, 0.0 if margin is None else checks.margin(margin))


def sides(
    q_ND: Tensor, k_MD: Tensor, ids: tuple[Tensor | None, Tensor | None],
    views: tuple[int | Tensor, int | Tensor], positive: Tensor | None, group: dist.ProcessGroup | None,
) -> tuple[Side, Side, bool]:  # fmt: skip
    """Rows and candidates of this rank with ids and views; True when one positive a row is certain."""
    (n, m), device, (q_id, k_id) = (q_ND.shape[0], k_MD.shape[0]), q_ND.device, ids
    single = q_id is None and k_id is None and positive is None
    if q_id is None and k_id is not None:
        raise InputError("q_id is missing: k_id says what k belongs to, q_id must say it of q")
    if q_id is not None and k_id is None:
        k_id = q_id
    if q_id is None and positive is not None:  # a mask of positives is all there is: no ids to compare
        q_id, k_id = unique_ids(n, group, device), -1 - unique_ids(m, group, device)
    if q_id is None or k_id is None:
        if n != m:
            raise InputError(
                f"q {checks.describe(q_ND)} and k {checks.describe(k_MD)} have different numbers of rows: "
                "give q_id and k_id to say which belong together"
            )
        q_id = k_id = unique_ids(n, group, device)
    return (
        Side(q_ND, checks.integers("q_id", q_id, (n,), device), checks.view("q_view", views[0], n, device)),
        Side(k_MD, checks.integers("k_id", k_id, (m,), device), checks.view("k_view", views[1], m, device)),
        single,
    )


def gathered(
    rows: Side, columns: Side, dtype: torch.dtype, direction: Direction, paired: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Side, Side, Side, Side]:  # fmt: skip
    """q and k of this rank, then q and k of the whole group, all of them widened to `dtype`."""
    local = [replace(side, features=side.features.to(dtype)) for side in (rows, columns)]
    if group is None or paired:
        return local[0], local[1], local[0], local[1]
    q_ND, k_MD = rows.features, columns.features
    facts = [
        q_ND.shape[0],
        k_MD.shape[0],
        q_ND.shape[1],
        q_ND.requires_grad,
        k_MD.requires_grad,
        q_ND.element_size(),
    ]
    everyone = exchange([int(x) for x in facts], group, q_ND.device)
    if len({tuple(f[2:]) for f in everyone}) > 1:
        raise InputError(
            "the ranks of the group disagree about q and k: (features, q needs a gradient, k needs one, "
            f"bytes of a number) are {[f[2:] for f in everyone]}"
        )
    sizes = [[f[0] for f in everyone], [f[1] for f in everyone]]
    for name, total in zip("qk", map(sum, sizes), strict=True):
        if total == 0:
            raise InputError(f"{name} has no rows on any rank of the group")
    wanted = [1, 0] if direction == "both" else [1]
    sides = [rows, columns]
    together = gather_features([sides[i].features for i in wanted], [sizes[i] for i in wanted], dtype, group)
    whole = list(local)
    for i, features in zip(wanted, together, strict=True):
        labels = gather_rows(torch.stack([sides[i].id, sides[i].view], 1), sizes[i], group)
        whole[i] = Side(features, labels[:, 0], labels[:, 1])
    return local[0], local[1], whole[0], whole[1]


def normalised(side: Side) -> Side:
    return replace(side, features=unit(side.features))


def with_negatives(
    problem: Problem, negatives: Tensor | None, negative_id: Tensor | None,
    own: Tensor | None, own_id: Tensor | None,
) -> Problem:  # fmt: skip
    q_ND, adapt = problem.rows.features, unit if problem.similarity == "cosine" else (lambda x: x)
    if negatives is not None:
        checks.fits("negatives", checks.features("negatives", negatives, "KD"), "q", q_ND)
        problem = replace(problem, negatives=adapt(negatives.to(q_ND.dtype)))
    if own is not None:
        checks.fits("own_negatives", checks.features("own_negatives", own, "NmD"), "q", q_ND)
        if own.shape[0] != q_ND.shape[0]:
            raise InputError(
                f"own_negatives {checks.describe(own)} must have one block for each row of "
                f"q {checks.describe(q_ND)}"
            )
        problem = replace(problem, own=adapt(own.to(q_ND.dtype)))
    for name, ids, of, x in (
        ("negative_id", negative_id, "negatives", negatives),
        ("own_negative_id", own_id, "own_negatives", own),
    ):
        if ids is not None:
            if x is None:
                raise InputError(f"{name} is given without {of}")
            checked = checks.integers(name, ids, tuple(x.shape[:-1]), q_ND.device)
            problem = replace(problem, **{"negative_id" if x.dim() == 2 else "own_id": checked})
    return problem


def with_pairs(
    problem: Problem, positive: Tensor | None, ignore: Tensor | None,
    log_noise: Scalar | None, log_weight: Scalar | None, weight: Tensor | None,
) -> Problem:  # fmt: skip
    like, n, c = problem.rows.features, problem.rows.features.shape[0], problem.num_candidates
    found: dict[str, Tensor] = {}
    for name, mask in (("positive", positive), ("ignore", ignore)):
        if mask is not None:
            found[name] = checks.per_pair(name, mask, n, c, like, boolean=True)
    for name, logs in (("log_noise", log_noise), ("log_weight", log_weight)):
        if logs is not None:
            x = logs if isinstance(logs, Tensor) else torch.tensor(float(logs), dtype=like.dtype)
            found[name] = checks.per_pair(name, x, n, c, like, boolean=False)
    if weight is not None:
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (n,):
            raise InputError(f"weight must be a tensor of shape ({n},), got {checks.describe(weight)}")
        found["weight"] = weight.detach().to(device=like.device, dtype=like.dtype)
    return replace(problem, **found)


def reverse(problem: Problem, columns: Side, all_rows: Side, group: dist.ProcessGroup | None) -> Problem:
    """Rows of k against candidates q: the transposed problem."""
    if problem.similarity == "cosine":
        columns, all_rows = normalised(columns), normalised(all_rows)
    turned: dict[str, Tensor] = {}
    for name in ("positive", "ignore", "log_noise", "log_weight"):
        x: Tensor | None = getattr(problem, name)
        if x is None or x.numel() == 1:
            continue
        if group is not None:
            raise InputError(
                f"{name} {checks.describe(x)} covers the rows of q; with direction='both' and a group "
                "call contrast once for each direction"
            )
        turned[name] = x.expand(problem.rows.features.shape[0], problem.num_candidates).mT
    if problem.weight is not None and problem.weight.shape[0] != columns.features.shape[0]:
        raise InputError(
            f"weight {checks.describe(problem.weight)} with direction='both' needs as many rows in k, "
            f"got {checks.describe(columns.features)}"
        )
    return replace(problem, rows=columns, columns=all_rows, **turned)
