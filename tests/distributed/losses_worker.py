"""Four gloo ranks that run every case below in groups of 1, 2, 3 and 4 of them, and save the gradients.

The test imports this file too, to run the same cases in one process.

Every leaf (features, negatives, scale, bias) is held by each rank as a parameter would be; a rank uses its
own rows. The mean of the ranks' gradients, which is what DDP forms, must then be the gradient of one process.

Shapes: N = rows of all ranks, D = features, K = queue, m = own negatives of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit import losses
from clipkit.errors import InputError
from clipkit.losses import contrast
from tests.distributed.support import launch

Leaves = dict[str, Tensor]
Where = dict[str, Any]  # the arguments `group` and `exchange`; nothing in one process
Case = Callable[[Leaves, slice, Where], Tensor]
N, D, K, M = 12, 6, 9, 3
SIZES = {1: [12], 2: [7, 5], 3: [6, 1, 5], 4: [3, 1, 6, 2]}
MEMBERS = {1: [3], 2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3]}  # the first two groups work at the same time
EXCHANGES = ("gather", "ring")


def rows_of(rank: int, world: int) -> slice:
    start = sum(SIZES[world][:rank])
    return slice(start, start + SIZES[world][rank])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(dtype: torch.dtype) -> Leaves:
    made = {
        "x": _random(5, N, D),
        "y": _random(6, N, D),
        "queue": _random(7, K, D),
        "own": _random(8, N, M, D),
    }
    made |= {"scale": torch.tensor(4.0), "bias": torch.tensor(-1.0)}
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 4, 0, 2, 5, 3, 1])
K_LABELS = LABELS.where(LABELS != 4, 40)  # row 6, alone on its rank in the group of 3, has no positive
QUEUE_ID = torch.tensor([0, 1, 90, 91, 92, 2, 93, 94, 95])  # some are ids of the batch
OWN_ID = torch.arange(100, 100 + N * M).view(N, M)
OWN_ID[:, 0] = LABELS.roll(1)  # now and then the row's own id
WEIGHT = torch.linspace(0.1, 2.0, N, dtype=torch.float64)
IGNORE, POSITIVE = _random(9, N, N) > 0.8, _random(10, N, N) > 0.7
LOG_WEIGHT = 0.5 * _random(11, N, N)


def _contrast(*, queue: bool = False, own: bool = False, **options: Any) -> Case:
    def run(p: Leaves, rows: slice, place: Where) -> Tensor:
        chosen = {
            name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()
        }
        if queue:
            chosen |= {"negatives": p["queue"], "negative_id": QUEUE_ID}
        if own:
            chosen |= {"own_negatives": p["own"][rows], "own_negative_id": OWN_ID[rows]}
        if options.get("link") not in ("pair", "align"):  # these two read the similarity as it is
            chosen |= {"scale": p["scale"], "bias": p["bias"]}
        return contrast(p["x"][rows], p["y"][rows], **chosen, **place).loss

    return run


def _more_candidates_than_rows(p: Leaves, rows: slice, place: Where) -> Tensor:
    """Two candidates for each row, whose order over the ranks is not that of one process."""
    k, k_id = torch.cat([p["y"][rows], p["own"][rows, 0]]), torch.cat([K_LABELS[rows], LABELS.flip(0)[rows]])
    return contrast(
        p["x"][rows], k, q_id=LABELS[rows], k_id=k_id, scale=p["scale"], direction="both", **place
    ).loss


def _frozen_candidates(p: Leaves, rows: slice, place: Where) -> Tensor:
    return losses.clip_loss(p["x"][rows], p["y"][rows].detach(), scale=p["scale"], **place)


LINKS: dict[str, dict[str, Any]] = {
    **{
        f"softmax {aggregate} {denominator}": {"aggregate": aggregate, "denominator": denominator}
        for aggregate in ("out", "in")
        for denominator in ("all", "one", "neg")
    },
    "logistic": {"link": "logistic"},
    "nce": {"link": "nce", "log_noise": 0.7},
    "hinge": {"link": "hinge", "margin": 0.5},
    "pair": {"link": "pair", "margin": 3.0, "similarity": "euclidean"},
    "align": {"link": "align"},
}
IDS: dict[str, Any] = {"q_id": LABELS, "k_id": K_LABELS}
BOTH: dict[str, Any] = {"direction": "both"}
MASKS: dict[str, Any] = {"ignore": IGNORE, "positive": POSITIVE}
SETTINGS: dict[str, dict[str, Any]] = {
    "one direction with duplicates, weights, a queue and own negatives": {
        **IDS, "weight": WEIGHT, "queue": True, "own": True,
    },
    "both directions with duplicates and weights": {**IDS, **BOTH, "weight": WEIGHT},
    "both directions with one positive": BOTH,
}  # fmt: skip
CASES: dict[str, Case] = {
    "clip_loss": lambda p, r, w: losses.clip_loss(p["x"][r], p["y"][r], scale=p["scale"], **w),
    "siglip_loss": lambda p, r, w: losses.siglip_loss(
        p["x"][r], p["y"][r], scale=p["scale"], bias=p["bias"], **w
    ),
    "nt_xent_loss": lambda p, r, w: losses.nt_xent_loss(p["x"][r], p["y"][r], temperature=p["scale"], **w),
    "info_nce_loss": lambda p, r, w: losses.info_nce_loss(p["x"][r], p["y"][r], temperature=p["scale"], **w),
    "info_nce_loss with a queue": lambda p, r, w: losses.info_nce_loss(
        p["x"][r], p["y"][r], negatives=p["queue"], temperature=p["scale"], **w
    ),
    "sup_con_loss": lambda p, r, w: losses.sup_con_loss(p["x"][r], LABELS[r], temperature=p["scale"], **w),
    "more candidates than rows": _more_candidates_than_rows,
    "frozen candidates": _frozen_candidates,
    "masks of local rows against global candidates": _contrast(**MASKS, log_weight=LOG_WEIGHT),
    "masks in both directions": _contrast(**MASKS, **BOTH, log_weight=LOG_WEIGHT, weight=WEIGHT),
    "masks in both directions, logistic": _contrast(**MASKS, **BOTH, link="logistic"),
    "blocks, queue and own negatives": _contrast(**IDS, queue=True, own=True, block=2),
    "blocks, both directions": _contrast(**IDS, **BOTH, block=2),
    "paired": _contrast(paired=True, own=True, weight=WEIGHT, link="hinge", margin=0.5),
    "euclidean softmax": _contrast(**IDS, **BOTH, similarity="euclidean"),
    "inner product": _contrast(**IDS, **BOTH, similarity="inner_product", link="logistic"),
    **{
        f"{link}, {setting}": _contrast(**options, **more)
        for link, options in LINKS.items()
        for setting, more in SETTINGS.items()
        if more is not BOTH or link.startswith("softmax")  # the others count positives as they come
    },
}


class Towers(nn.Module):
    """A pair of encoders whose parameters, scale and bias DDP averages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(D, 4), nn.Linear(D, 4, bias=False)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.image(x), self.text(y), self.log_scale.exp(), self.bias


def towers_step(rows: slice, place: Where) -> dict[str, Tensor]:
    """Gradients of one step with DDP (or without, in one process)."""
    model = Towers().double()  # float32 sums of gradients above 1 differ in the seventh digit
    wrapped = DistributedDataParallel(model, process_group=place["group"]) if place else model
    p = leaves(torch.float64)
    image, text, scale, bias = wrapped(p["x"][rows].detach(), p["y"][rows].detach())
    loss = losses.clip_loss(image, text, scale=scale, **place)
    loss = loss + losses.siglip_loss(image, text, scale=scale, bias=bias, **place)
    loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return gradients | {"loss": loss.detach()}


def statistics(rows: slice, place: Where) -> dict[str, Tensor]:
    p = leaves(torch.float64)
    out = contrast(p["x"][rows], p["y"][rows], q_id=LABELS[rows], scale=3.0, direction="both", **place)
    assert out.accuracy is not None
    found = {"value": out.value, "rows": out.rows, "skipped": out.skipped, "candidates": out.candidates}
    found |= {"accuracy": out.accuracy, "positive_similarity": out.positive_similarity}
    bound = contrast(p["x"][rows], p["y"][rows], scale=3.0, direction="both", **place).mi_bound
    found |= {"mi_bound": torch.tensor(torch.nan) if bound is None else bound}
    return found | {"negative_similarity": out.negative_similarity}


def gradients(case: Case, rows: slice, place: Where, dtype: torch.dtype) -> dict[str, Tensor]:
    p = leaves(dtype)
    loss = case(p, rows, place)
    grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    found = {n: torch.zeros_like(p[n]) if g is None else g for n, g in zip(p, grads, strict=True)}
    return found | {"loss": loss.detach()}


def _or_refusal(call: Callable[[], Any]) -> Any:
    """What the call returns, or what it says when it refuses: that fails one case and not all of them."""
    try:
        return call()
    except InputError as error:
        return str(error)


def run_all(rank: int, world: int, place: Where) -> dict[str, Any]:
    """Everything, as rank `rank` of a group of `world`."""
    rows = rows_of(rank, world)
    results: dict[str, Any] = {
        str(dtype): {
            name: _or_refusal(lambda case=case, dtype=dtype: gradients(case, rows, place, dtype))
            for name, case in CASES.items()
        }
        for dtype in (torch.float32, torch.float64)
    }
    results["narrow"] = gradients(CASES["clip_loss"], rows, place, torch.bfloat16)
    results["towers"] = towers_step(rows, place)
    results["statistics"] = statistics(rows, place)
    everything = slice(0, N if rank == 0 else 0)  # the other ranks have no rows at all
    results["empty"] = gradients(CASES["clip_loss"], everything, place, torch.float64)
    p = leaves(torch.float32)
    frozen = p["x"] if rank == 0 else p["x"].detach()
    results["frozen"] = _or_refusal(lambda: losses.clip_loss(frozen, p["y"], scale=1.0, **place).detach())
    width = D if rank == 0 else D - 1
    narrow = (p["x"][:, :width], p["y"][:, :width])
    mixed = {**place, "exchange": EXCHANGES[rank % 2]}
    results["ways"] = _or_refusal(lambda: losses.clip_loss(p["x"], p["y"], scale=1.0, **mixed).detach())
    results["width"] = _or_refusal(lambda: losses.clip_loss(*narrow, scale=1.0, **place).detach())
    return results


def work(rank: int, _: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    # In a process outside of it a group is a number. All are made first: waiting for a group polls the store.
    groups: dict[int, Any] = {world: dist.new_group(MEMBERS[world]) for world in SIZES}
    p, results = leaves(torch.float32), {}
    for world in SIZES:
        for exchange in EXCHANGES:
            place = {"group": groups[world], "exchange": exchange}
            results[f"{exchange} {world}"] = (
                run_all(MEMBERS[world].index(rank), world, place)
                if rank in MEMBERS[world]
                else _or_refusal(lambda place=place: losses.clip_loss(p["x"], p["y"], scale=1.0, **place))
            )
    return results


if __name__ == "__main__":
    launch(work, 4)
