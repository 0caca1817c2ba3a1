"""The node of `contrast` in torch's graph: from the passes of `engine` to losses that autograd knows.

A gradient can be taken once; a second derivative is refused, because it would be wrong. Compiled callers
get the same node as an operator (`compiled`); with a process group they break their graph here.

Shapes: N = rows, m = rows of k.
"""

from typing import Any

import torch
from torch import Tensor

from clipkit.losses import compiled
from clipkit.losses.compiled import refuse
from clipkit.losses.engine import Inverses, Leaves, Memory, Solution, Task, backward_pass, forward_pass
from clipkit.losses.tiles import Tile


def solve(task: Task, leaves: Leaves) -> Solution:
    """Evaluate a task. `loss` and `column_loss` are differentiable, once; a collective with a group."""
    if torch.compiler.is_compiling() and task.group is None:
        return compiled.solve(task, leaves)
    found: Any = _Contrast.apply(task, *leaves)
    return Solution(*found)


class _Contrast(torch.autograd.Function):
    """`Solution` from a task and its leaves."""

    @staticmethod
    def forward(ctx: Any, task: Task, *tensors: Any) -> Any:
        solution, memory = forward_pass(task, Leaves(*tensors), any(ctx.needs_input_grad))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for i, x in enumerate(solution) if x is not None and i not in (0, 4)))
        ctx.task, ctx.kept = task, memory.kept is not None
        flat = (x for tile in memory.kept or () for x in tile)
        ctx.save_for_backward(*tensors, *memory[:3], *memory.inverses, *flat)
        return tuple(solution)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        saved = ctx.saved_tensors
        leaves, flat, size = Leaves(*saved[:8]), saved[15:], len(Tile._fields)
        kept = [Tile(*flat[i : i + size]) for i in range(0, len(flat), size)] if ctx.kept else None
        gathered, need, of_need = saved[8:11]
        memory = Memory(gathered, need, of_need, kept, Inverses(*saved[11:15]))
        grads = backward_pass(ctx.task, leaves, memory, upstream[0], upstream[4], ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            anchors = [x for x in (*upstream, *leaves) if x is not None and x.requires_grad]
            return None, *(None if g is None else _Once.apply(g, *anchors) for g in grads)
        return None, *grads


class _Once(torch.autograd.Function):
    """A gradient as it is, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    backward = staticmethod(refuse)
