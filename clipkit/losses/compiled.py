"""`contrast` inside `torch.compile`: its two passes as operators that the compiler does not look into.

The sweeps choose their way by values (whether a tile holds a positive, how far its scores range), which a
traced graph cannot. As operators they leave the caller's graph whole (`fullgraph=True`), for one process.
An operator takes tensors, numbers and strings, so a task is taken apart here and put together again inside.

Shapes: N = rows, m = rows of k.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.errors import InputError
from clipkit.losses.engine import Leaves, Memory, Solution, Task, backward_pass, forward_pass, inverses
from clipkit.losses.links import Rule
from clipkit.losses.problem import wide


def solve(task: Task, leaves: Leaves) -> Solution:
    """`node.solve` for a compiled caller without a process group."""
    rule = task.rule
    words = [rule.link, rule.denominator, rule.aggregate, task.similarity]
    flags = [rule.single, task.paired, task.both]
    tensors = [
        task.row_id, task.row_view, task.column_id, task.column_view,
        task.negative_id, task.own_id, task.positive, task.ignore,
    ]  # fmt: skip
    found = _forward(*leaves, tensors, " ".join(words), flags, rule.margin, task.block or 0)
    return Solution(*found[:7]) if task.both else Solution(*found[:4])


def _task(
    tensors: Sequence[Tensor | None], words: str, flags: Sequence[bool], margin: float, block: int, m: int
) -> Task:
    link, denominator, aggregate, similarity = words.split()
    single, paired, both = flags
    rule: Any = Rule(link, denominator, aggregate, margin, single)  # pyright: ignore[reportArgumentType]
    ids: Any = tensors[:4]
    return Task(*ids, [m], rule, similarity, paired, both, *tensors[4:], block or None)  # pyright: ignore


@torch.library.custom_op("clipkit::contrast", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, negatives: Tensor | None, own: Tensor | None, scale: Tensor, bias: Tensor,
    log_weight: Tensor | None, log_noise: Tensor | None,
    tensors: Sequence[Tensor | None], words: str, flags: Sequence[bool], margin: float, block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    leaves = Leaves(q, k, negatives, own, scale, bias, log_weight, log_noise)
    task = _task(tensors, words, flags, margin, block, k.shape[0])
    solution, memory = forward_pass(task, leaves, False)
    columns: Any = solution[4:]
    if not task.both:
        columns = scale.new_empty(0), scale.new_empty(0, dtype=torch.bool), scale.new_empty(8, 0)
    of_need = scale.new_empty(5, 0) if memory.of_need is None else memory.of_need
    return *solution[:4], *columns, memory.need, of_need


@_forward.register_fake
def _(*inputs: Any) -> Any:
    q, k, scale, flags = inputs[0], inputs[1], inputs[4], inputs[10]
    n, m, new = q.shape[0], k.shape[0] if flags[2] else 0, scale.new_empty
    rows = new(n), new(n, dtype=torch.bool), new(8, n), new(2, dtype=wide(scale))
    return *rows, new(m), new(m, dtype=torch.bool), new(8, m), new(5, n), new(5, m)


@torch.library.custom_op("clipkit::contrast_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, negatives: Tensor | None, own: Tensor | None, scale: Tensor, bias: Tensor,
    log_weight: Tensor | None, log_noise: Tensor | None,
    tensors: Sequence[Tensor | None], words: str, flags: Sequence[bool], margin: float, block: int,
    need: Tensor, of_need: Tensor, upstream: Tensor, of_columns: Tensor, wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    leaves = Leaves(q, k, negatives, own, scale, bias, log_weight, log_noise)
    task = _task(tensors, words, flags, margin, block, k.shape[0])
    memory = Memory(None, need, of_need if task.both else None, None, inverses(task, leaves, None))
    grads = backward_pass(task, leaves, memory, upstream, of_columns, wanted)
    return [scale.new_empty(0) if g is None else g for g in grads]


@_backward.register_fake
def _(*inputs: Any) -> list[Tensor]:
    leaves, wanted, scale = inputs[:8], inputs[-1], inputs[4]
    return [x.new_empty(x.shape) if w else scale.new_empty(0) for x, w in zip(leaves, wanted, strict=True)]


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    leaves, tensors, words = inputs[:8], inputs[8], inputs[9:]
    ctx.save_for_backward(*leaves, *tensors, output[7], output[8])
    ctx.words = words
    ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i not in (0, 4)))


def _differentiate(ctx: Any, *upstream: Any) -> Any:
    saved, wanted = ctx.saved_tensors, list(ctx.needs_input_grad[:8])
    leaves, tensors, memory = saved[:8], list(saved[8:16]), saved[16:]
    grads = _backward(*leaves, tensors, *ctx.words, *memory, upstream[0], upstream[4], wanted)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * 5


def refuse(ctx: Any, *upstream: Any) -> Any:
    """The backward pass of a gradient."""
    raise InputError(
        "contrast() was differentiated twice: second derivatives are not implemented, since scores are not "
        "kept but computed again. Where you need them, write the loss in torch operations"
    )


torch.library.register_autograd("clipkit::contrast", _differentiate, setup_context=_remember)
torch.library.register_autograd("clipkit::contrast_backward", refuse)
