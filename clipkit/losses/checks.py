"""What the losses accept: every wrong argument becomes an `InputError` that names it and its shape.

Checks read shapes and dtypes; values only where that costs nothing (Python numbers, tensors in host
memory), never by waiting for an accelerator.
"""

import math

import torch
from torch import Tensor

from clipkit.errors import InputError

Scalar = float | Tensor
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(x: object) -> str:
    """Shape and dtype of a tensor, or the type of something else."""
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def features(name: str, x: Tensor, dims: str = "ND") -> Tensor:
    """A floating tensor with one axis for each letter of `dims`, at least one feature."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != len(dims):
        raise InputError(f"{name} must be a floating tensor of shape ({', '.join(dims)}), got {describe(x)}")
    if x.shape[-1] == 0:
        raise InputError(f"{name} {describe(x)} has no features: its last axis is empty")
    return x


def fits(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """`x` has the features and the device of `other`."""
    if x.shape[-1] != other.shape[-1]:
        raise InputError(
            f"{name} {describe(x)} and {other_name} {describe(other)} must have the same number of features"
        )
    if x.device != other.device:
        raise InputError(f"{name} is on {x.device}, {other_name} on {other.device}: move one of them")


def same_shape(**tensors: Tensor) -> None:
    """All tensors have one shape."""
    if len({tuple(x.shape) for x in tensors.values()}) > 1:
        raise InputError(
            " and ".join(f"{name} {describe(x)}" for name, x in tensors.items()) + " must have the same shape"
        )


def not_empty(name: str, x: Tensor) -> None:
    """At least one row."""
    if x.shape[0] == 0:
        raise InputError(f"{name} {describe(x)} has no rows")


def integers(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Integer ids of the given shape, as int64 on the device."""
    if not isinstance(x, Tensor) or x.dtype not in _INTEGERS:
        raise InputError(f"{name} must be a tensor of integers of shape {shape}, got {describe(x)}")
    if tuple(x.shape) != shape:
        raise InputError(f"{name} must have shape {shape}, one id for each row, got {describe(x)}")
    return x.to(device=device, dtype=torch.int64)


def view(name: str, x: int | Tensor, n: int, device: torch.device) -> Tensor:
    """A view number, or one for each row, as int64 (n,)."""
    if isinstance(x, Tensor):
        return integers(name, x, (n,), device)
    if isinstance(x, bool) or not isinstance(x, int):
        raise InputError(
            f"{name} must be an integer or a tensor of integers of shape ({n},), got {describe(x)}"
        )
    return torch.full((n,), x, dtype=torch.int64, device=device)


def _known(x: Scalar) -> float | None:
    """The value, where reading it does not wait for an accelerator or break a compiled graph."""
    if isinstance(x, Tensor):
        return float(x.detach()) if x.device.type == "cpu" and not torch.compiler.is_compiling() else None
    return float(x)


def scalar(name: str, x: Scalar, like: Tensor, *, above: float | None = None) -> Tensor:
    """A number or one-element tensor as a 0-d tensor of the dtype and device of `like`, with its gradient.

    `above`: the smallest value that is refused, e.g. 0 for a scale.
    """
    is_number = isinstance(x, (int, float)) and not isinstance(x, bool)
    if not is_number and not (isinstance(x, Tensor) and x.numel() == 1 and x.is_floating_point()):
        raise InputError(f"{name} must be a number or a floating tensor with one element, got {describe(x)}")
    value = _known(x)
    if value is not None and (not math.isfinite(value) or (above is not None and value <= above)):
        limit = "finite" if above is None else f"finite and > {above:g}"
        raise InputError(f"{name} must be {limit}, got {value}")
    if isinstance(x, Tensor):
        return x.reshape(()).to(device=like.device, dtype=like.dtype)
    return torch.tensor(x, dtype=like.dtype, device=like.device)


def temperature(x: Scalar, like: Tensor) -> Tensor:
    """1 / temperature, for a temperature > 0."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return scalar("temperature", x, like.detach().to(dtype), above=0.0).reciprocal()


def margin(x: float) -> float:
    """A finite margin ≥ 0."""
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) or x < 0:
        raise InputError(f"margin must be a finite number >= 0, got {x!r}")
    return float(x)


def one_of(name: str, x: str, allowed: tuple[str, ...]) -> None:
    """A word out of a list."""
    if x not in allowed:
        raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {x!r}")


def per_pair(name: str, x: Tensor, n: int, c: int, like: Tensor, *, boolean: bool) -> Tensor:
    """Something that broadcasts to rows × candidates: bool masks or floating log-weights."""
    if not isinstance(x, Tensor) or (x.dtype == torch.bool) != boolean:
        raise InputError(f"{name} must be a {'bool' if boolean else 'floating'} tensor, got {describe(x)}")
    try:
        fits_shape = torch.broadcast_shapes(x.shape, (n, c)) == (n, c)
    except RuntimeError:
        fits_shape = False
    if not fits_shape:
        raise InputError(
            f"{name} {describe(x)} must broadcast to ({n}, {c}): the rows against all candidates "
            "(k over the whole group, then the shared and the own negatives)"
        )
    return x.to(like.device) if boolean else x.to(device=like.device, dtype=like.dtype)
