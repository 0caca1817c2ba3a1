"""BatchNorm whose statistics are those of other rows than the module's own batch: all ranks', or groups'.

`synchronised` makes the BatchNorm of a model see the rows of all ranks, as one process with the whole batch
would; `split` makes it see groups of this rank's rows apart, as so many ranks would. The one idea: a
converted layer takes over parameters and buffers under their own names, so a state dict and a saved model are
those of the plain model. In eval mode a converted layer does what the plain one does.

Shapes: N rows, C channels, W ranks; x is (N, C) or (N, C, …).
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules._functions import SyncBatchNorm as _CudaSync
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.distributed import group_size, sum_over_group
from clipkit.errors import ConfigError, InputError

M = TypeVar("M", bound=nn.Module)


def synchronised(module: M, group: dist.ProcessGroup | None) -> M:
    """Let every BatchNorm of a module take the statistics of all ranks' rows.

    Outputs, running statistics and, after DDP's mean over the ranks, gradients are those of one process with
    all rows, also for unequal batches. `torch.nn.SyncBatchNorm` refuses to run on a CPU; on a GPU its kernels
    are used here too.

    Args:
        module: Its BatchNorm layers are replaced in place; parameters and buffers stay the same tensors.
        group: The ranks; None, or a group of one, changes nothing.

    Returns:
        `module`, or what replaces it where it is a BatchNorm itself.

    Raises:
        ConfigError: A kind of BatchNorm that cannot be converted.
    """
    if group is None or group_size(group) == 1:
        return module
    return _convert(module, lambda norm: _Synchronised(norm, group))


def split(module: M, groups: int) -> M:
    """Let every BatchNorm of a module take statistics over consecutive groups of rows, apart from each other.

    One process then trains as so many ranks do that each take their own statistics, which MoCo needs. A
    running statistic moves towards the mean of the groups' statistics.

    Args:
        module: Its BatchNorm layers are replaced in place; parameters and buffers stay the same tensors.
        groups: Of this rank's rows, ≥ 1; sizes differ by one row at most. 1 is plain BatchNorm.

    Returns:
        `module`, or what replaces it where it is a BatchNorm itself.

    Raises:
        InputError: `groups` is below 1; or, in a forward pass, a group would have less than two rows.
        ConfigError: A kind of BatchNorm that cannot be converted.

    References:
        He et al. 2020, "Momentum Contrast", section 3.3 (shuffling BN).
    """
    if groups < 1:
        raise InputError(f"groups must be an integer >= 1, got {groups}")
    return _convert(module, lambda norm: _Split(norm, groups))


def _convert(module: Any, make: Callable[[_BatchNorm], nn.Module]) -> Any:
    from timm.layers.norm_act import BatchNormAct2d

    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
    made: dict[nn.Module, nn.Module] = {}  # a layer that stands in two places stays one
    for name, norm in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(norm, _BatchNorm):
            continue
        if type(norm) not in plain and not isinstance(norm, _Converted):
            raise ConfigError(
                f"{name or 'the module'}: statistics of a {type(norm).__name__} cannot be changed"
            )
        new = made.setdefault(norm, make(norm))
        if not name:
            return new
        module.set_submodule(name, new)
    return module


class _Converted(_BatchNorm):
    """A BatchNorm with the tensors of another one, and with what timm's `BatchNormAct2d` does after it."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        for name, parameter in norm._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in norm._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in norm.named_children():  # of a BatchNormAct2d: drop, act
            self.add_module(name, child)
        self.training = norm.training

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            y = self.train_forward(input, self._share())
        else:
            mean, var = self.running_mean, self.running_var
            y = F.batch_norm(input, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)
        for child in self.children():
            y = child(y)
        return y

    def train_forward(self, x: Tensor, share: float) -> Tensor:
        """The normalised rows; running statistics move by `share` of the way."""
        raise NotImplementedError

    def _share(self) -> float:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the mean of all batches so far
                return 1.0 / float(self.num_batches_tracked)
        return self.momentum or 0.0


class _Split(_Converted):
    def __init__(self, norm: _BatchNorm, groups: int) -> None:
        super().__init__(norm)
        self.groups = groups

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"

    def train_forward(self, x: Tensor, share: float) -> Tensor:
        if len(x) < 2 * self.groups:
            raise InputError(
                f"BatchNorm in {self.groups} groups needs two rows in each, the batch has {len(x)} rows"
            )
        stats = [copy.deepcopy((self.running_mean, self.running_var)) for _ in range(self.groups)]
        parts = [
            F.batch_norm(rows, mean, var, self.weight, self.bias, True, share, self.eps)
            for rows, (mean, var) in zip(x.tensor_split(self.groups), stats, strict=True)
        ]
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.copy_(torch.stack([mean for mean, _ in stats if mean is not None]).mean(0))
            self.running_var.copy_(torch.stack([var for _, var in stats if var is not None]).mean(0))
        return torch.cat(parts)


class _Synchronised(_Converted):
    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm)
        self.ranks = _Ranks(group)

    def train_forward(self, x: Tensor, share: float) -> Tensor:
        group = self.ranks.group
        if x.is_cuda:
            options = (self.running_mean, self.running_var, self.eps, share, group, group_size(group))
            return _CudaSync.apply(x, self.weight, self.bias, *options)
        y, mean_C, var_C, count = _Normalise.apply(x, self.weight, self.bias, self.eps, group)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean_C.to(self.running_mean), share)
            self.running_var.lerp_((var_C * count / (count - 1)).to(self.running_var), share)
        return y


class _Ranks:
    """A process group, which has no copies: a copied module is of the same group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ranks":
        return self


class _Normalise(Function):
    """(x − mean) / √(var + eps) · weight + bias with the moments of all ranks' rows.

    Backward is that of one process:  ∂x = w / σ · (∂y − mean(∂y) − x̂ · mean(∂y · x̂)), both means over all
    ranks; the gradients of weight and bias are this rank's part of their sum, as DDP expects.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_C, var_C, count = _moments(wide, group)
        if count < 2:
            raise InputError("BatchNorm needs two values of each channel, the batch of all processes has one")
        inverse_C = (var_C + eps).rsqrt().to(wide)
        normal = (wide - _along(mean_C.to(wide), x)) * _along(inverse_C, x)
        y = normal if weight is None else normal * _along(weight, x)
        y = y if bias is None else y + _along(bias, x)
        ctx.save_for_backward(normal, inverse_C, weight)
        ctx.count, ctx.group = count, group
        ctx.mark_non_differentiable(mean_C, var_C, count)
        return y.to(x.dtype), mean_C, var_C, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        normal, inverse_C, weight = ctx.saved_tensors
        grad = grads[0].to(normal)
        dims = _dims(grad)
        bias_grad_C, weight_grad_C = grad.sum(dims), (grad * normal).sum(dims)
        grad_x = None
        if ctx.needs_input_grad[0]:
            shift_C, slope_C = (
                sum_over_group(torch.stack([bias_grad_C, weight_grad_C]), ctx.group) / ctx.count
            )
            rows = grad - _along(shift_C, grad) - normal * _along(slope_C, grad)
            factor_C = inverse_C if weight is None else inverse_C * weight
            grad_x = (rows * _along(factor_C, grad)).to(grads[0].dtype)
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return (
            grad_x,
            weight_grad_C if needs_weight else None,
            bias_grad_C if needs_bias else None,
            None,
            None,
        )


def _moments(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count (0-d) of all ranks' values, float64, the same on each rank.

    Each rank sums squares around its own mean; the parts are put together as Chan, Golub and LeVeque (1983)
    do, which stays exact where the mean is large.
    """
    channels, dims = x.shape[1], _dims(x)
    count = x.numel() // channels
    mean_C = x.sum(dims) / max(count, 1)
    squares_C = (x - _along(mean_C, x)).square().sum(dims)
    mine = torch.cat([mean_C, squares_C, mean_C.new_tensor([count])]).double()
    parts = [torch.empty_like(mine) for _ in range(group_size(group))]
    dist.all_gather(parts, mine, group=group)
    means_WC, squares_WC, counts_W1 = torch.stack(parts).split([channels, channels, 1], dim=1)
    total = counts_W1.sum()
    mean_C = (means_WC * counts_W1).sum(0) / total
    apart_WC = (means_WC - mean_C).square() * counts_W1
    return mean_C, (squares_WC + apart_WC).sum(0) / total, total


def _dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _along(values_C: Tensor, x: Tensor) -> Tensor:
    """Values of the channels, to be broadcast against x."""
    return values_C.view(1, -1, *[1] * (x.dim() - 2))
