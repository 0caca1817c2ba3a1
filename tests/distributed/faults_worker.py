"""Faults that other libraries had or have in distributed contrastive losses, each with its repair and ours.

Every fault is a small function that computes the faulty loss, or, with `repaired`, the same loss without that
one fault; both differ from each other in one place. Beside it in `FAULTS` stands the call of clipkit that
computes the same loss. Three gloo ranks run the table in groups of 2 and 3 and save the gradients. The test
imports this file too, to run clipkit's in one process.

Every leaf is held by each rank as a parameter would be, a rank uses its own rows, and the mean of the ranks'
gradients is what DDP forms. Batches are equally large on all ranks, as most of the faulty code demands.

Shapes: N = rows of all ranks, n = N / W rows of this rank, D = features, W = ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipkit import losses
from tests.distributed.support import launch

Leaves = dict[str, Tensor]
Where = dict[str, Any]  # the arguments `group` and `exchange`; nothing in one process
N, D = 12, 5
SIZES = (2, 3)
IDS = torch.arange(N)


@dataclass(frozen=True)
class Here:
    """This rank's place in a group."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def rows(self) -> slice:
        return rows_of(self.rank, self.size)

    @property
    def labels(self) -> Tensor:
        """Where this rank's rows stand among those of all ranks."""
        return IDS[self.rows]


def rows_of(rank: int, size: int) -> slice:
    return slice(rank * N // size, (rank + 1) * N // size)


def leaves() -> Leaves:
    """Features whose rows belong together: y near x, and hard negatives almost as near."""
    generator = torch.Generator().manual_seed(3)
    x, noise, more = torch.randn(3, N, D, generator=generator, dtype=torch.float64)
    made = {"x": x, "y": x + 0.5 * noise, "hard": x + more}
    made["scale"] = torch.tensor(6.0, dtype=torch.float64)
    return {name: value.requires_grad_() for name, value in made.items()}


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward gives the own rows the gradient of this rank's copy, or of all copies."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, here: Here, summed: bool) -> Tensor:
        ctx.here, ctx.summed = here, summed
        blocks = [torch.empty_like(local) for _ in range(here.size)]
        dist.all_gather(blocks, local.contiguous(), group=here.group)
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].clone()
        if ctx.summed:
            dist.all_reduce(grad, group=ctx.here.group)
        return grad.chunk(ctx.here.size)[ctx.here.rank], None, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks; backward passes the gradient of this rank's copy, or that of all copies."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, here: Here, summed: bool) -> Tensor:
        ctx.here, ctx.summed, total = here, summed, local.clone()
        dist.all_reduce(total, group=here.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].clone()
        if ctx.summed:
            dist.all_reduce(grad, group=ctx.here.group)
        return grad, None, None


def gather(local: Tensor, here: Here, *, summed: bool = True) -> Tensor:
    found = _Gather.apply(local, here, summed)
    assert isinstance(found, Tensor)
    return found


def total(local: Tensor, here: Here, *, summed: bool) -> Tensor:
    found = _Sum.apply(local, here, summed)
    assert isinstance(found, Tensor)
    return found


def unit(p: Leaves, name: str, here: Here) -> Tensor:
    """This rank's rows of a leaf, normalised."""
    return F.normalize(p[name][here.rows], dim=1)


def gather_without_sum(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = unit(p, "x", here), unit(p, "y", here)
    everyone = torch.cat([gather(x, here, summed=repaired), gather(y, here, summed=repaired)])
    itself, other = torch.cat([here.labels, N + here.labels]), torch.cat([N + here.labels, here.labels])
    logits = p["scale"] * torch.cat([x, y]) @ everyone.T
    return F.cross_entropy(logits.scatter(1, itself[:, None], -torch.inf), other)


def labels_moved_without_gather(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = unit(p, "x", here), unit(p, "y", here)
    n = x.shape[0]
    others = ~torch.eye(n, dtype=torch.bool)
    x_logits = torch.cat([x @ y.T, (x @ x.T)[others].view(n, -1)], 1)
    y_logits = torch.cat([y @ x.T, (y @ y.T)[others].view(n, -1)], 1)
    label = torch.arange(n) + (0 if repaired else here.rank * n)
    label[label >= 2 * n - 1] = -100  # no such column: an error there, left out here
    logits = p["scale"] * torch.cat([x_logits, y_logits])
    return F.cross_entropy(logits, label.repeat(2), reduction="sum") / (2 * n)


def statistics_without_backward(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = unit(p, "x", here), unit(p, "y", here)
    columns = total((p["scale"] * x @ gather(y, here).T).exp().sum(0), here, summed=repaired)
    positives = total(p["scale"] * (x * y).sum(), here, summed=repaired)
    return columns.log().mean() - positives / N


def views_joined_before_gather(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = unit(p, "x", here), unit(p, "y", here)
    apart = torch.cat([gather(x, here), gather(y, here)])  # x of all ranks, then y of all ranks
    z = apart if repaired else gather(torch.cat([x, y]), here)  # x and y of rank 0, x and y of rank 1, …
    logits = (p["scale"] * z @ z.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.cat([N + IDS, IDS]))


def whole_loss_with_local_gradients(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = (gather(unit(p, name, here), here, summed=repaired) for name in ("x", "y"))
    return F.cross_entropy(p["scale"] * x @ y.T, IDS)


def whole_loss_in_both_directions(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = (gather(unit(p, name, here), here, summed=repaired) for name in ("x", "y"))
    logits = p["scale"] * x @ y.T
    return (F.cross_entropy(logits, IDS) + F.cross_entropy(logits.T, IDS)) / 2


def positives_and_negatives_joined_before_gather(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y, hard = (unit(p, name, here) for name in ("x", "y", "hard"))
    apart = torch.cat([gather(y, here), gather(hard, here)])
    candidates = apart if repaired else gather(torch.cat([y, hard]), here)
    return F.cross_entropy(p["scale"] * x @ candidates.T, here.labels)


def local_rows_in_both_directions(p: Leaves, here: Here, repaired: bool) -> Tensor:
    x, y = unit(p, "x", here), unit(p, "y", here)
    x_all, y_all = (gather(z, here) if repaired else gather(z.detach(), here) for z in (x, y))
    rows = F.cross_entropy(p["scale"] * x @ y_all.T, here.labels)
    return (rows + F.cross_entropy(p["scale"] * y @ x_all.T, here.labels)) / 2


def scale_summed_before_the_mean(p: Leaves, here: Here, repaired: bool) -> Tensor:
    scale = p["scale"] * 1.0
    if not repaired:
        scale.register_hook(lambda grad: total(grad, here, summed=False))
    return local_rows_in_both_directions({**p, "scale": scale}, here, True)


def our_nt_xent(p: Leaves, rows: slice, where: Where) -> Tensor:
    return losses.nt_xent_loss(p["x"][rows], p["y"][rows], temperature=1 / p["scale"], **where)


def our_columns(p: Leaves, rows: slice, where: Where) -> Tensor:
    return losses.info_nce_loss(p["y"][rows], p["x"][rows], temperature=1 / p["scale"], **where)


def our_rows(p: Leaves, rows: slice, where: Where) -> Tensor:
    return losses.info_nce_loss(p["x"][rows], p["y"][rows], temperature=1 / p["scale"], **where)


def our_clip(p: Leaves, rows: slice, where: Where) -> Tensor:
    return losses.clip_loss(p["x"][rows], p["y"][rows], scale=p["scale"], **where)


def our_hard_negatives(p: Leaves, rows: slice, where: Where) -> Tensor:
    candidates = torch.cat([p["y"][rows], p["hard"][rows]])
    ids = torch.cat([IDS[rows], N + IDS[rows]])
    return losses.contrast(p["x"][rows], candidates, q_id=IDS[rows], k_id=ids, scale=p["scale"], **where).loss


Theirs = Callable[[Leaves, Here, bool], Tensor]
Ours = Callable[[Leaves, slice, Where], Tensor]
FAULTS: dict[str, tuple[Theirs, Ours]] = {
    "gather without sum": (gather_without_sum, our_nt_xent),
    "labels moved without gather": (labels_moved_without_gather, our_nt_xent),
    "statistics without backward": (statistics_without_backward, our_columns),
    "views joined before gather": (views_joined_before_gather, our_nt_xent),
    "whole loss with local gradients": (whole_loss_with_local_gradients, our_rows),
    "whole loss in both directions": (whole_loss_in_both_directions, our_clip),
    "positives and negatives joined before gather": (
        positives_and_negatives_joined_before_gather, our_hard_negatives,
    ),
    "local rows in both directions": (local_rows_in_both_directions, our_clip),
    "scale summed before the mean": (scale_summed_before_the_mean, our_clip),
}  # fmt: skip
LOCAL = ("labels moved without gather",)  # each rank by itself, with its own rows as negatives


def gradients(compute: Callable[[Leaves], Tensor]) -> dict[str, Tensor]:
    p = leaves()
    loss = compute(p)
    grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    found = {n: torch.zeros_like(p[n]) if g is None else g for n, g in zip(p, grads, strict=True)}
    return found | {"loss": loss.detach()}


def versions(fault: str, here: Here) -> dict[str, dict[str, Tensor]]:
    """Gradients on this rank: faulty, repaired, and clipkit's, for each way to exchange rows."""
    theirs, ours = FAULTS[fault]
    ways: dict[str, Where] = {
        f"clipkit, {how}": {} if fault in LOCAL else {"group": here.group, "exchange": how}
        for how in ("gather", "ring")
    }
    return {
        "faulty": gradients(lambda p: theirs(p, here, False)),
        "repaired": gradients(lambda p: theirs(p, here, True)),
        **{name: gradients(lambda p, way=way: ours(p, here.rows, way)) for name, way in ways.items()},
    }


def work(rank: int, _: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    results = {}
    for size in SIZES:
        members: Any = dist.new_group(list(range(size)))
        if rank < size:
            results[str(size)] = {fault: versions(fault, Here(rank, size, members)) for fault in FAULTS}
    return results


if __name__ == "__main__":
    launch(work, max(SIZES))
