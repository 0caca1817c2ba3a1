"""The slow twin of a module: an exponential moving average of its weights (MoCo's keys, BYOL's targets).

The one idea: the twin is a plain module in its own right, with a step count and nothing else. It holds no
reference to its source, and the decay is a function of the step alone, so there is nothing to lose on resume.

Symbols: θ = weights of the source, ξ = weights of the twin, τ = decay, k = updates so far.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.state.common import Counter, fraction, positive

Decay = float | Callable[[int], float]
Pairs = list[tuple[Tensor, Tensor]]


def cosine_decay(base: float, total_steps: int) -> Callable[[int], float]:
    """BYOL's decay, rising from `base` to 1 along half a cosine.

        τ(k) = 1 − (1 − τ_0) (cos(π k / K) + 1) / 2, and 1 for k ≥ K

    Args:
        base: τ_0 in [0, 1], the decay of the first update.
        total_steps: K ≥ 1, updates of the whole run.

    Returns:
        A function of the step k ≥ 0, for `Ema`.

    Raises:
        InputError: an argument is out of its range.

    References:
        Grill et al. 2020, "Bootstrap Your Own Latent", section 3.2. τ_0 = 0.996 for 1000 epochs of ImageNet,
        0.99 for 100 and 300 in the authors' code; MoCo v3 has 0.99 for 100.
    """
    fraction("base", base, one=True)
    positive("total_steps", total_steps)

    def decay(step: int) -> float:
        return 1 - (1 - base) * (math.cos(math.pi * min(step, total_steps) / total_steps) + 1) / 2

    return decay


class Ema(nn.Module):
    """A copy of a module that follows its weights slowly; calling it calls the copy.

        ξ ← τ(k) ξ + (1 − τ(k)) θ,   starting from ξ = θ

    `update(source)` comes before the keys are encoded in MoCo v1 and v2 (the twin then sees the weights of
    the last step), and after the optimizer's step in BYOL and MoCo v3. With DDP every rank updates from the
    same weights, so the twins' weights stay equal without communication; pass the module, not its wrapper.

    The twin's parameters require no gradient. A bfloat16 or float16 twin rounds most updates to nothing:
    `Ema(module, …).float()` keeps a wide one.

    State dict: `step` (k, 0-d int64) and the twin's own as `module.*`; the source is not in it.

    Unlike `torch.optim.swa_utils.AveragedModel`, whose first update copies the source, the first update here
    averages as all others do: the twin starts as the copy.

    Args:
        module: the source, of which a deep copy is made.
        decay: τ in [0, 1], or a function from the step k (0 for the first update) to it, with nothing else
            it depends on, such as `cosine_decay`. 1 leaves the twin as it is, 0 copies the source.
        buffers: what becomes of buffers such as BatchNorm's statistics. "copy": copied from the source in
            every update, right for a twin in eval mode; "ema": averaged as the weights are, integers copied;
            "own": left to the twin, which in train mode gathers statistics of its own batches, as the key
            encoder of MoCo and the target of BYOL do.

    Raises:
        InputError: decay or buffers is none of these.

    References:
        He et al. 2020, "Momentum Contrast", eq. 2; Grill et al. 2020, "Bootstrap Your Own Latent", eq. 1.
    """

    step: Tensor

    def __init__(
        self, module: nn.Module, decay: Decay, *, buffers: Literal["copy", "ema", "own"] = "copy"
    ) -> None:
        super().__init__()
        checks.one_of("buffers", buffers, ("copy", "ema", "own"))
        self.decay = decay if callable(decay) else fraction("decay", decay, one=True)
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._buffers_are, self._step = buffers, Counter()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The twin's forward."""
        return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"decay={self.decay}, buffers={self._buffers_are!r}"

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Move the twin towards the source by one step.

        Args:
            source: the module that the twin was made from, or one of the same structure; its dtype and
                device may differ from the twin's.

        Raises:
            InputError: names or shapes of the source's parameters or buffers are not the twin's, or the
                decay of this step is outside of [0, 1]. The twin is then unchanged.
        """
        step = self._step.read(self.step)
        decay = self._decay_of(step)
        pairs = _pairs("parameter", self.module.named_parameters(), source.named_parameters())
        copied: Pairs = []
        if self._buffers_are != "own":
            buffers = _pairs("buffer", self.module.named_buffers(), source.named_buffers())
            (pairs if self._buffers_are == "ema" else copied).extend(buffers)
        averaged = [(mine, theirs) for mine, theirs in pairs if _is_averaged(mine)]
        copied += [(mine, theirs) for mine, theirs in pairs if not _is_averaged(mine)]

        if averaged:
            twin, near = [mine for mine, _ in averaged], [theirs.to(mine) for mine, theirs in averaged]
            get_ema_multi_avg_fn(decay)(twin, near, step)
        for mine, theirs in copied:
            mine.copy_(theirs)
        self._step.write(self.step, step + 1)

    def _decay_of(self, step: int) -> float:
        if not callable(self.decay):
            return self.decay
        return fraction(f"the decay of step {step}", self.decay(step), one=True)


def _is_averaged(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _pairs(kind: str, twin: Iterable[tuple[str, Tensor]], source: Iterable[tuple[str, Tensor]]) -> Pairs:
    """Every tensor of the twin with the source's tensor of the same name."""
    mine, theirs = dict(twin), dict(source)
    hint = "pass the module that the Ema was made from, not a wrapper such as DDP or torch.compile around it"
    for name in [*mine, *theirs]:
        if name not in mine or name not in theirs:
            owner = "the source" if name in theirs else "the twin"
            raise InputError(f"source: only {owner} has a {kind} {name!r}", hint=hint)
        if mine[name].shape != theirs[name].shape:
            raise InputError(
                f"source: {kind} {name!r} has shape {tuple(theirs[name].shape)}, "
                f"{tuple(mine[name].shape)} in the twin",
                hint=hint,
            )
    return [(mine[name], theirs[name]) for name in mine]
