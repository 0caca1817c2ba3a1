"""A big contrastive batch in little memory: `cached_backward`, known as GradCache.

The rows of a contrastive batch depend on one another only through their features. So all rows are encoded
chunk by chunk without a graph; one loss on all features leaves the gradient of each feature; then every chunk
is encoded again, now with a graph and with the same random numbers, and sends its features' gradients back.
Memory holds the graph of one chunk and the features of the batch, for the price of a second forward pass.

Shapes: N = rows of one encoder's input (of this rank, where a group is given), n = rows of a chunk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from clipkit.distributed import group_rank, group_size, sum_over_group
from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.losses.similarity import full_precision

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Encoder = Callable[[Any], Tensor]


def cached_backward(
    encoders: Sequence[Encoder],
    inputs: Sequence[Inputs],
    loss: Callable[..., Tensor],
    *,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    modules: Sequence[nn.Module] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Tensor:
    """`loss(encoder(input), …).backward()` with the graph of only `chunk_size` rows in memory.

        ∂L/∂θ = Σ_chunks (∂L/∂f_chunk) (∂f_chunk/∂θ),   f = features of all rows, computed beforehand

    Adds to `.grad` as backward() does, for parameters of the encoders, parameters used by the loss itself,
    and inputs that require a gradient. Numbers drawn from torch's generators (dropout) are the same in both
    passes; afterwards the generators stand where the first pass and the loss left them. With `group` the
    gradients are averaged over its ranks once, after the last chunk, and never by DDP itself.

    Args:
        encoders: each maps a chunk of its input to features (n, …), floating, row by row: a module, a bound
            method of one, or (with `modules`) anything else. It must be a function of its input, its
            parameters and torch's random numbers alone. One encoder may stand here several times. One that
            needs no gradient runs only once.
        inputs: for each encoder a tensor (N, …), or a tuple or dict of such tensors with the same N. The
            encoder is called with a tensor, tuple or dict of n rows.
        loss: called once with the features (N, …) of every encoder, in their order; any differentiable
            function that returns a scalar.
        chunk_size: rows encoded at a time, ≥ 1; need not divide N, and the ranks may have different N.
        group: average over these ranks what this call adds to the gradients, in one all-reduce of all
            trainable parameters of `modules`. Where no rank has a gradient, none is made; where only some
            ranks have one, it is 0 on the others. Give the loss the same group.
        modules: all modules that the encoders and the loss use. Default: the encoders, or the modules they
            are methods of. DistributedDataParallel is fine; sharded parameters (FSDP) are not.
        backward: what to do instead of `loss.backward()`, e.g. `lambda loss: scaler.scale(loss).backward()`
            for a GradScaler.

    Returns:
        What `loss` returned, detached.

    Raises:
        InputError: an argument does not fit; a BatchNorm takes its statistics from the batch, which a chunk
            is not; or, with `group`, a parameter is used that `modules` do not have. After this and any other
            error the random state and the gradients of `modules` are those from before the call; gradients
            of inputs and of other parameters may have been added in part.

    References:
        Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", §3.
    """
    group_rank(group)  # refuses a process outside of the group, before the others wait for it
    modules = _modules_of(encoders) if modules is None else modules
    replicas = _checked_replicas(modules, group)
    jobs = _jobs(encoders, inputs, chunk_size, modules)
    everything = {id(p): p for module in modules for p in module.parameters()}  # each once, also if shared
    parameters = [p for p in everything.values() if p.requires_grad]
    with ExitStack() as stack:
        for replica in replicas:
            stack.enter_context(replica.no_sync())
        stack.enter_context(_all_or_nothing(parameters, jobs[0].devices))
        value = _differentiate(jobs, loss, backward, None if group is None else set(everything))
        if group is not None:
            _average(parameters, group)
    return value


class _RandomState:
    """The state of torch's generators on the CPU and on some accelerators, as it is now."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = [(d, torch.get_device_module(d).get_rng_state(*_argument(d))) for d in devices]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, *_argument(device))


def _argument(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch.mps knows one device and takes no argument


@contextmanager
def _all_or_nothing(parameters: Sequence[Tensor], devices: Sequence[torch.device]) -> Iterator[None]:
    """Start without gradients, add what has come to the earlier ones; after an error put all back."""
    start, earlier = _RandomState(devices), [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    except BaseException:
        start.restore()
        for p, gradient in zip(parameters, earlier, strict=True):
            p.grad = gradient
        raise
    for p, gradient in zip(parameters, earlier, strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else gradient.add_(p.grad)


@dataclass
class _Job:
    """One encoder with its input cut into chunks, and the random state each chunk began with."""

    encoder: Encoder
    inputs: Inputs
    chunks: list[slice]
    devices: list[torch.device]
    states: list[_RandomState] = field(default_factory=list)

    def features(self, averaged: set[int] | None) -> Tensor:
        """First pass: features of all rows, a leaf; it requires a gradient if the encoder does."""
        parts: list[Tensor] = []
        needed = False
        for rows in self.chunks:
            self.states.append(_RandomState(self.devices))
            with torch.set_grad_enabled(not parts):  # the first chunk's graph tells if there is a second pass
                part = self._encode(rows)
            needed = needed or part.requires_grad
            _refuse_strays(part, averaged, _tensors(self.inputs))
            parts.append(part.detach().clone())  # cloned: a view would keep all hidden states alive
            del part  # and with it the graph, before the next chunk
        return torch.cat(parts).requires_grad_(needed)

    def send_back(self, gradient: Tensor) -> None:
        """Second pass: encode every chunk again and send the gradient of its features through it."""
        for rows, state in zip(self.chunks, self.states, strict=True):
            state.restore()
            with torch.enable_grad():
                part = self._encode(rows)
            with full_precision(part):
                torch.autograd.backward(part, gradient[rows])
            del part

    def _encode(self, rows: slice) -> Tensor:
        chunk = _chunk(self.inputs, rows)
        n = _tensors(chunk)[0].shape[0]
        part = self.encoder(chunk)
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.shape[:1] != (n,):
            raise InputError(
                f"an encoder must return one floating tensor with a row for each of its {n} input rows, "
                f"got {checks.describe(part)}"
            )
        return part


def _differentiate(
    jobs: list[_Job], loss: Callable[..., Tensor], backward: Callable[[Tensor], object],
    averaged: set[int] | None,
) -> Tensor:  # fmt: skip
    """Both passes, with the loss between them; `averaged`: ids of the parameters to average, if any are."""
    features = [job.features(averaged) for job in jobs]
    with torch.enable_grad():
        value = loss(*features)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        raise InputError(f"loss must return a scalar tensor, got {checks.describe(value)}")
    if not value.requires_grad:
        raise InputError("nothing needs a gradient: the encoders are frozen, or the loss detaches features")
    _refuse_strays(value, averaged, features)
    with full_precision(value), torch.enable_grad():
        backward(value)
    after = _RandomState(jobs[0].devices)
    for job, feature in zip(jobs, features, strict=True):
        if feature.grad is not None:
            job.send_back(feature.grad)
    after.restore()
    return value.detach()


@torch.no_grad()
def _average(parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace every gradient by its mean over the ranks, in float32 or wider; one collective."""
    if not parameters:
        return
    device, dtypes = parameters[0].device, {p.dtype for p in parameters}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    parts.append(torch.tensor([p.grad is not None for p in parameters]))
    flat = torch.cat([x.reshape(-1).to(device, dtype) for x in parts])
    *totals, counts = sum_over_group(flat, group).split([x.numel() for x in parts])
    for p, total, ranks in zip(parameters, totals, counts.tolist(), strict=True):
        if ranks > 0:
            p.grad = (total / group_size(group)).view(p.shape).to(p.device, p.dtype)


def _jobs(
    encoders: Sequence[Encoder], inputs: Sequence[Inputs], chunk_size: int, modules: Sequence[nn.Module]
) -> list[_Job]:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise InputError(f"chunk_size must be an integer >= 1, got {chunk_size!r}")
    if len(encoders) == 0 or len(encoders) != len(inputs):
        raise InputError(f"every encoder needs its input, got {len(encoders)} encoders, {len(inputs)} inputs")
    counts = [_count_rows(f"inputs[{i}]", x) for i, x in enumerate(inputs)]
    tensors = [x for given in inputs for x in _tensors(given)]
    tensors += [p for module in modules for p in module.parameters()]
    devices = list({x.device for x in tensors if x.device.type not in ("cpu", "meta")})
    starts = [range(0, max(n, 1), chunk_size) for n in counts]  # without rows one empty chunk, for its shape
    chunks = [[slice(i, i + chunk_size) for i in s] for s in starts]
    return [_Job(*job, devices) for job in zip(encoders, inputs, chunks, strict=True)]


def _tensors(inputs: Inputs) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs)


def _chunk(inputs: Inputs, rows: slice) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[rows]
    if isinstance(inputs, Mapping):
        return {name: x[rows] for name, x in inputs.items()}
    return tuple(x[rows] for x in inputs)


def _count_rows(name: str, inputs: Inputs) -> int:
    tensors = _tensors(inputs) if isinstance(inputs, (Tensor, Mapping, tuple, list)) else []
    rows = {x.shape[0] if isinstance(x, Tensor) and x.dim() else None for x in tensors}
    if len(rows) != 1 or None in rows:
        got = ", ".join(map(checks.describe, tensors)) or checks.describe(inputs)
        raise InputError(
            f"{name} must be a tensor, or a tuple or dict of tensors with the same first axis, got {got}"
        )
    if any(x.requires_grad and not x.is_leaf for x in tensors):
        raise InputError(f"{name} comes with a graph: detach it, or let the encoder compute it from a leaf")
    return tensors[0].shape[0]


def _modules_of(encoders: Sequence[Encoder]) -> list[nn.Module]:
    """The encoders, or what they are bound methods of."""
    owners: list[Any] = [getattr(encoder, "__self__", encoder) for encoder in encoders]
    for i, owner in enumerate(owners):
        if not isinstance(owner, nn.Module):
            raise InputError(f"encoders[{i}] is no module and no method of one: name its modules in modules=")
    return owners


def _checked_replicas(
    modules: Sequence[nn.Module], group: dist.ProcessGroup | None
) -> list[DistributedDataParallel]:
    """The DDP modules, after refusing what chunks would change."""
    parts = [(module, *named) for module in modules for named in module.named_modules()]
    for module, name, part in parts:
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            raise InputError(
                f"{type(part).__name__} {name!r} of {type(module).__name__} would take its statistics from "
                "each chunk instead of the batch: put it in eval mode, where it uses its running statistics "
                "if it keeps them, or use GroupNorm"
            )
    replicas = [part for *_, part in parts if isinstance(part, DistributedDataParallel)]
    if replicas and group is None:
        raise InputError("modules are DistributedDataParallel: give group, over which to average gradients")
    return replicas


def _refuse_strays(value: Tensor, averaged: set[int] | None, others: Sequence[Tensor]) -> None:
    """Every leaf that the backward pass of `value` ends in is averaged, or one of `others`."""
    if averaged is None:
        return
    waiting, seen, known = [value.grad_fn], set(), averaged | set(map(id, others))
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            raise InputError(
                f"a parameter {checks.describe(leaf)} is in none of the modules, and so would miss the "
                "averaging of gradients: add its module, or nn.ParameterList([it]), to modules"
            )
        waiting.extend(following for following, _ in node.next_functions)
