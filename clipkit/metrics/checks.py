"""What every metric asks of its arguments, with one wording for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.errors import InputError


def features(name: str, x: Any) -> Tensor:
    """`x` as floats (rows, features): float64 stays, all else becomes float32. Raises: InputError."""
    x = torch.as_tensor(x)
    if x.dim() != 2 or not x.is_floating_point() or x.shape[0] == 0:
        raise InputError(
            f"{name} must be floating, of shape (rows, features) with a row at least, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    return x if x.dtype == torch.float64 else x.float()


def two_features(**named: Any) -> tuple[Tensor, Tensor]:
    """Two sets of features on the device of the first, in their wider type. Raises: InputError."""
    (first, x), (second, y) = ((name, features(name, value)) for name, value in named.items())
    if x.shape[1] != y.shape[1]:
        raise InputError(f"{first} {tuple(x.shape)} and {second} {tuple(y.shape)} differ in their features")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(x.device, dtype)


def ids(name: str, x: Any, rows: int, device: torch.device) -> Tensor:
    """`x` as int64 (rows,) on a device. Raises: InputError."""
    x = torch.as_tensor(x)
    if x.dim() != 1 or x.shape[0] != rows or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise InputError(f"{name} must be integers of shape ({rows},), got {tuple(x.shape)} {x.dtype}")
    return x.to(device=device, dtype=torch.int64)


def cutoffs(ks: Sequence[int]) -> list[int]:
    """`ks` as a list of integers ≥ 1. Raises: InputError."""
    if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
        raise InputError(f"ks must be integers >= 1, got {list(ks)!r}")
    return list(ks)
