"""From the arguments of `contrast` to a checked `Task`: rule, ids and views, negatives, pairs.

Each step takes what the caller gave, refuses what cannot be meant with an `InputError`, and returns the part
of the task it is about. The only communication is in `agreed` and `identities`: first what all ranks must
agree about, then ids and views; features are exchanged by the engine.

Shapes: as in `primitive`.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipkit.distributed import exchange, gather_rows, unique_ids
from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.losses.checks import Scalar
from clipkit.losses.engine import Exchange, Leaves, Task
from clipkit.losses.links import Aggregate, Denominator, Link, Rule
from clipkit.losses.problem import Side, Similarity


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


def agreed(
    q_ND: Tensor, k_mD: Tensor, way: Exchange, group: dist.ProcessGroup
) -> tuple[list[int], list[int]]:
    """Rows of q and of k of each rank, after making sure that the ranks mean the same."""
    facts = [
        q_ND.shape[0],
        k_mD.shape[0],
        q_ND.shape[1],
        q_ND.requires_grad,
        k_mD.requires_grad,
        q_ND.element_size(),
        way == "ring",
    ]
    everyone = exchange([int(x) for x in facts], group, q_ND.device)
    if len({tuple(f[2:]) for f in everyone}) > 1:
        raise InputError(
            "the ranks of the group disagree about q and k: (features, q needs a gradient, k needs one, "
            f"bytes of a number, exchange is ring) are {[f[2:] for f in everyone]}"
        )
    for i, name in enumerate("qk"):
        if sum(f[i] for f in everyone) == 0:
            raise InputError(f"{name} has no rows on any rank of the group")
    return [f[0] for f in everyone], [f[1] for f in everyone]


def identities(columns: Side, sizes: list[int], group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Ids and views of the rows of k of all ranks."""
    if group is None:
        return columns.id, columns.view
    labels = gather_rows(torch.stack([columns.id, columns.view], 1), sizes, group)
    return labels[:, 0].contiguous(), labels[:, 1].contiguous()


def with_negatives(task: Task, leaves: Leaves, negative_id: Tensor | None, own_id: Tensor | None) -> Task:
    """The ids of the negatives, after a look at the negatives themselves."""
    q_ND, shared, own = leaves.q, leaves.negatives, leaves.own
    if shared is not None:
        checks.fits("negatives", checks.features("negatives", shared, "KD"), "q", q_ND)
    if own is not None:
        checks.fits("own_negatives", checks.features("own_negatives", own, "NmD"), "q", q_ND)
        if own.shape[0] != q_ND.shape[0]:
            raise InputError(
                f"own_negatives {checks.describe(own)} must have one block for each row of "
                f"q {checks.describe(q_ND)}"
            )
    for name, ids, of, x in (
        ("negative_id", negative_id, "negatives", shared),
        ("own_negative_id", own_id, "own_negatives", own),
    ):
        if ids is not None:
            if x is None:
                raise InputError(f"{name} is given without {of}")
            checked = checks.integers(name, ids, tuple(x.shape[:-1]), q_ND.device)
            task = replace(task, **{"negative_id" if x.dim() == 2 else "own_id": checked})
    return task


def with_pairs(
    task: Task, leaves: Leaves, positive: Tensor | None, ignore: Tensor | None,
    log_noise: Scalar | None, log_weight: Scalar | None,
) -> tuple[Task, Leaves]:  # fmt: skip
    """What is said of pairs, once the number of candidates is known."""
    n, like, found = leaves.q.shape[0], leaves.scale, {}
    width = task.columns + sum(x.shape[-2] for x in (leaves.negatives, leaves.own) if x is not None)
    for name, mask in (("positive", positive), ("ignore", ignore)):
        if mask is not None:
            found[name] = checks.per_pair(name, mask, n, width, like, boolean=True)
    logs: dict[str, Tensor] = {}
    for name, log in (("log_noise", log_noise), ("log_weight", log_weight)):
        if log is not None:
            x = log if isinstance(log, Tensor) else torch.tensor(float(log), dtype=like.dtype)
            logs[name] = checks.per_pair(name, x, n, width, like, boolean=False)
    return replace(task, **found), leaves._replace(**logs)


def weights(weight: Tensor | None, like: Tensor, n: int, m: int | None) -> Tensor | None:
    """The rows' weights (n,); `m`: they are those of m rows of k too."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (n,):
        raise InputError(f"weight must be a tensor of shape ({n},), got {checks.describe(weight)}")
    if m is not None and m != n:
        raise InputError(
            f"weight {checks.describe(weight)} with direction='both' needs as many rows in k, got {m}"
        )
    return weight.detach().to(device=like.device, dtype=like.dtype)


def reverse(task: Task, leaves: Leaves, columns: Side, rows_of_all: list[int]) -> tuple[Task, Leaves]:
    """Rows of k against candidates q: the transposed task, for links that need whole rows.

    Args:
        task: the task of rows of q.
        leaves: its tensors.
        columns: ids and views of this rank's rows of k.
        rows_of_all: rows of q of each rank.
    """
    turned: dict[str, Tensor | None] = {}
    n, width = leaves.q.shape[0], task.columns
    for name in ("positive", "ignore", "log_noise", "log_weight"):
        x: Tensor | None = getattr(leaves if name.startswith("log") else task, name)
        if x is not None and x.numel() > 1:
            x = x.expand(n, width)
            if task.group is not None:
                if x.requires_grad:
                    raise InputError(f"{name} has no gradient here: call contrast once for each direction")
                x = gather_rows(x, rows_of_all, task.group)[:, task.mine]
            x = x.mT
        turned[name] = x
    rows = Side(leaves.q, task.row_id, task.row_view)
    row_id, row_view = identities(rows, rows_of_all, task.group)
    swapped = leaves._replace(
        q=leaves.k, k=leaves.q, log_noise=turned["log_noise"], log_weight=turned["log_weight"]
    )
    return replace(
        task, row_id=columns.id, row_view=columns.view, column_id=row_id, column_view=row_view,
        sizes=rows_of_all, positive=turned["positive"], ignore=turned["ignore"],
    ), swapped  # fmt: skip
