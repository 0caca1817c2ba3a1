"""One of two gloo ranks that run `cached_backward` on unequal shares of a batch, and save what it left.

The test imports this file too, to run the same step in one process. Collectives are counted by the process
group itself.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.errors import InputError
from clipkit.losses import clip_loss
from clipkit.losses.cached import cached_backward
from tests.distributed.support import launch

Group = dist.ProcessGroup | None
Gradients = dict[str, Tensor | None]
N, D, CHUNK = 12, 6, 3


class Model(nn.Module):
    """Two towers and a scale; `forward` is for DDP, `unused` is in no loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(nn.Linear(D, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
        self.text = nn.Sequential(nn.Linear(D, 16), nn.GroupNorm(4, 16), nn.GELU(), nn.Linear(16, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.image(x["image"]) if "image" in x else self.text(x["text"])

    def encode_image(self, x: Tensor) -> Tensor:
        return self.image(x)

    def encode_text(self, x: Tensor) -> Tensor:
        return self.text(x)


def batch(rows: slice) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randn(N, D, generator=g)[rows] for _ in range(2)]


def loss_of(model: Model, group: Group) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda image, text: clip_loss(image, text, scale=model.log_scale.exp(), group=group)


def found(model: nn.Module, value: Tensor) -> dict[str, Any]:
    gradients: Gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": value, "gradients": gradients}


def step(rows: slice, group: Group) -> dict[str, Any]:
    """One step on `rows`, with every rank's earlier gradient of the scale set to its rank + 1."""
    model = Model()
    model.log_scale.grad = torch.tensor(1.0 if group is None else dist.get_rank(group) + 1.0)
    encoders = [model.encode_image, model.encode_text]
    value = cached_backward(encoders, batch(rows), loss_of(model, group), chunk_size=CHUNK, group=group)
    return found(model, value)


def replicated(rows: slice, group: dist.ProcessGroup, find_unused: bool) -> dict[str, Any]:
    """The same through the forward of a DDP module, and around it by methods of the module inside."""
    outer, inner = (
        DistributedDataParallel(Model(), process_group=group, find_unused_parameters=find_unused)
        for _ in range(2)
    )
    image, text = batch(rows)
    before = collectives_so_far(group)
    loss = loss_of(outer.module, group)
    inputs = [{"image": image}, {"text": text}]
    value = cached_backward([outer, outer], inputs, loss, chunk_size=CHUNK, group=group)
    collectives = collectives_so_far(group) - before
    assert outer.require_backward_grad_sync  # switched on again for others
    encoders, loss = [inner.module.encode_image, inner.module.encode_text], loss_of(inner.module, group)
    cached_backward(encoders, [image, text], loss, chunk_size=CHUNK, group=group)
    around = found(inner.module, value)["gradients"]
    return found(outer.module, value) | {"collectives": collectives, "around": around}


def collectives_so_far(group: Any) -> int:
    return group._get_sequence_number_for_group()  # the group's own count, of those that DDP starts too


def collectives_of_the_loss(rows: slice, group: dist.ProcessGroup) -> int:
    """How many the loss itself needs, forward and backward, on features that are there."""
    before = collectives_so_far(group)
    x, y = (v.requires_grad_() for v in batch(rows))
    loss_of(Model(), group)(x, y).backward()
    return collectives_so_far(group) - before


def uneven(rank: int, group: Group) -> dict[str, Any]:
    """Only rank 0 uses the text tower, part of which is frozen."""
    model = Model()
    model.text[0].requires_grad_(False)
    encoders = [model.encode_image, model.encode_text] if rank == 0 else [model.encode_image]

    def loss(*features: Tensor) -> Tensor:
        return torch.stack([x.pow(2).mean() for x in features]).sum()

    inputs = batch(slice(0, 4))[: len(encoders)]
    return found(model, cached_backward(encoders, inputs, loss, chunk_size=CHUNK, group=group))


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def refusals(rows: slice, group: dist.ProcessGroup) -> dict[str, str]:
    model, stray = Model(), nn.Parameter(torch.tensor(1.0))
    ddp = DistributedDataParallel(Model(), process_group=group)
    image, text = batch(rows)
    towers = [model.image, model.text]

    def step(scale: Tensor, encoders: list[Any], **options: Any) -> Callable[[], Tensor]:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            return clip_loss(x, y, scale=scale.exp(), group=group)

        return lambda: cached_backward(encoders, [image, text], loss, chunk_size=CHUNK, **options)

    scale = nn.ParameterList([stray])
    return {
        "parameter of the loss": refusal(step(stray, towers, group=group)),
        "parameter of an encoder": refusal(step(stray, towers, group=group, modules=[model.text, scale])),
        "ddp alone": refusal(step(stray, [ddp, ddp])),
        "nothing": refusal(step(stray, towers, group=group, modules=[*towers, scale])),
    }


def work(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """Everything this rank finds out."""
    first: Any = dist.new_group([0])  # in a process outside of it, a number
    rows = [slice(0, 7), slice(7, N)][rank]
    linear, x = nn.Linear(D, 2), batch(rows)[0]
    results: dict[str, Any] = {
        "step": step(rows, group),
        "no rows": step([slice(0, N), slice(N, N)][rank], group),
        "ddp": replicated(rows, group, find_unused=False),
        "ddp that looks for unused parameters": replicated(rows, group, find_unused=True),
        "collectives": collectives_of_the_loss(rows, group),
        "uneven": uneven(rank, group),
        "refused": refusals(rows, group),
        "outside": refusal(lambda: cached_backward([linear], [x], torch.mean, chunk_size=2, group=first)),
    }
    return results


if __name__ == "__main__":
    launch(work, 2)
