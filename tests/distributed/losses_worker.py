"""One of three gloo ranks that run every case below, all three and the first two, and save the gradients.

Run as `python losses_worker.py RANK STORE OUT`; the ranks meet through the file STORE, so there is no port
to race for. The test imports this file too, to run the same cases in one process.

Every leaf (features, scale, bias) is held by each rank as a parameter would be; a rank uses its own rows. The
mean of the ranks' gradients, which is what DDP forms, must then be the gradient of one process.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit import losses
from clipkit.errors import InputError
from clipkit.losses import contrast

Group = dist.ProcessGroup | None
Case = Callable[[dict[str, Tensor], slice, Group], Tensor]
N, D = 12, 6
SIZES = {1: [12], 2: [7, 5], 3: [6, 1, 5]}


def rows_of(rank: int, world: int) -> slice:
    start = sum(SIZES[world][:rank])
    return slice(start, start + SIZES[world][rank])


def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    made = {
        "x": torch.randn(N, D, generator=g, dtype=torch.float64),
        "y": torch.randn(N, D, generator=g, dtype=torch.float64),
        "scale": torch.tensor(4.0),
        "bias": torch.tensor(-1.0),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 4, 0, 2, 5, 3, 1])  # 4 and 5 occur once
WEIGHT = torch.linspace(0.1, 2.0, N, dtype=torch.float64)
QUEUE = torch.randn(9, D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
QUEUE_ID = torch.tensor([0, 1, 90, 91, 92, 2, 93, 94, 95])
OWN = torch.randn(N, 3, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
IGNORE = torch.rand(N, N, generator=torch.Generator().manual_seed(8)) < 0.3


def _contrast(**options: Any) -> Case:
    def run(p: dict[str, Tensor], rows: slice, group: Group) -> Tensor:
        chosen = {name: value[rows] if name in PER_ROW else value for name, value in options.items()}
        chosen = {
            k: v.to(p["x"].dtype) if k in ("negatives", "own_negatives") else v for k, v in chosen.items()
        }
        if "similarity" not in chosen:
            chosen |= {"scale": p["scale"], "bias": p["bias"]}
        return contrast(p["x"][rows], p["y"][rows], **chosen, group=group).loss

    return run


PER_ROW = ("q_id", "k_id", "weight", "own_negatives", "ignore", "positive")
CASES: dict[str, Case] = {
    "clip_loss": lambda p, r, g: losses.clip_loss(p["x"][r], p["y"][r], scale=p["scale"], group=g),
    "siglip_loss": lambda p, r, g: losses.siglip_loss(
        p["x"][r], p["y"][r], scale=p["scale"], bias=p["bias"], group=g
    ),
    "nt_xent_loss": lambda p, r, g: losses.nt_xent_loss(
        p["x"][r], p["y"][r], temperature=p["scale"], group=g
    ),
    "info_nce_loss": lambda p, r, g: losses.info_nce_loss(
        p["x"][r], p["y"][r], temperature=p["scale"], group=g
    ),
    "info_nce_loss with a queue": lambda p, r, g: losses.info_nce_loss(
        p["x"][r], p["y"][r], negatives=QUEUE.to(p["x"].dtype), temperature=p["scale"], group=g
    ),
    "sup_con_loss": lambda p, r, g: losses.sup_con_loss(
        p["x"][r], LABELS[r], temperature=p["scale"], group=g
    ),
    "both with duplicates and weights": _contrast(q_id=LABELS, weight=WEIGHT, direction="both"),
    "queue and own negatives": _contrast(
        q_id=LABELS, negatives=QUEUE, negative_id=QUEUE_ID, own_negatives=OWN, weight=WEIGHT
    ),
    "masks of local rows against global candidates": _contrast(ignore=IGNORE),
    "explicit positives": _contrast(positive=IGNORE),
    "blocks": _contrast(q_id=LABELS, direction="both", block=2),
    "softmax in": _contrast(q_id=LABELS, aggregate="in"),
    "softmax one": _contrast(q_id=LABELS, denominator="one"),
    "softmax neg": _contrast(q_id=LABELS, denominator="neg"),
    "nce": _contrast(link="nce", log_noise=0.7, own_negatives=OWN),
    "hinge": _contrast(q_id=LABELS, link="hinge", margin=0.5),
    "pair": _contrast(q_id=LABELS, link="pair", margin=3.0, similarity="euclidean"),
    "align": _contrast(link="align", similarity="cosine", paired=True),
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


def towers_step(rows: slice, group: Group) -> dict[str, Tensor]:
    """Gradients of one step with DDP (or without, in one process)."""
    model = Towers()
    wrapped = model if group is None else DistributedDataParallel(model, process_group=group)
    p = leaves(torch.float32)
    image, text, scale, bias = wrapped(p["x"][rows].detach(), p["y"][rows].detach())
    loss = losses.clip_loss(image, text, scale=scale, group=group)
    loss = loss + losses.siglip_loss(image, text, scale=scale, bias=bias, group=group)
    loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return gradients | {"loss": loss.detach()}


def statistics(rows: slice, group: Group) -> dict[str, Tensor]:
    p = leaves(torch.float64)
    out = contrast(p["x"][rows], p["y"][rows], q_id=LABELS[rows], scale=3.0, direction="both", group=group)
    assert out.accuracy is not None
    found = {"value": out.value, "rows": out.rows, "skipped": out.skipped, "candidates": out.candidates}
    found |= {"accuracy": out.accuracy, "positive_similarity": out.positive_similarity}
    unique = contrast(p["x"][rows], p["y"][rows], scale=3.0, direction="both", group=group).mi_bound
    assert unique is not None
    return found | {"negative_similarity": out.negative_similarity, "mi_bound": unique}


def gradients(case: Case, rows: slice, group: Group, dtype: torch.dtype) -> dict[str, Tensor]:
    p = leaves(dtype)
    loss = case(p, rows, group)
    grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    found = {n: torch.zeros_like(p[n]) if g is None else g for n, g in zip(p, grads, strict=True)}
    return found | {"loss": loss.detach()}


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def run_all(rank: int, world: int, group: dist.ProcessGroup) -> dict[str, Any]:
    rows = rows_of(rank, world)
    results: dict[str, Any] = {
        str(dtype): {name: gradients(case, rows, group, dtype) for name, case in CASES.items()}
        for dtype in (torch.float32, torch.float64)
    }
    results["narrow"] = gradients(CASES["clip_loss"], rows, group, torch.bfloat16)
    results["towers"] = towers_step(rows, group)
    results["statistics"] = statistics(rows, group)
    everything = slice(0, N if rank == 0 else 0)  # the other ranks have no rows at all
    results["empty"] = gradients(CASES["clip_loss"], everything, group, torch.float64)
    p = leaves(torch.float32)
    frozen = p["x"] if rank == 0 else p["x"].detach()
    results["frozen"] = _refusal(lambda: losses.clip_loss(frozen, p["y"], scale=1.0, group=group))
    width = D if rank == 0 else D - 1
    narrow = (p["x"][:, :width], p["y"][:, :width])
    results["width"] = _refusal(lambda: losses.clip_loss(*narrow, scale=1.0, group=group))
    return results


def main(rank: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    two: Any = dist.new_group([0, 1])  # in a process outside of it, a number
    whole = dist.group.WORLD
    assert whole is not None
    results: dict[str, Any] = {"3": run_all(rank, 3, whole)}
    p = leaves(torch.float32)
    if rank < 2:
        results["2"] = run_all(rank, 2, two)
    else:
        results["2"] = _refusal(lambda: losses.clip_loss(p["x"], p["y"], scale=1.0, group=two))
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
