"""Similarities and distances between every row of one matrix and every row of another.

Everything is computed in float32 (float64 stays float64) with autocast switched off, whatever the dtype of
the inputs: a bf16 logit between 64 and 128 has a spacing of 0.5, which a contrastive loss can feel.

Shapes: x_ND, y_MD → (N, M); a leading batch dimension is allowed.
"""

import torch
from torch import Tensor

from clipkit.errors import InputError


def widen(x: Tensor) -> Tensor:
    """`x` as float32, or as float64 where it is float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which autocast is off on the device of `x`."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def unit(x: Tensor) -> Tensor:
    """Rows divided by their length: x / ‖x‖₂, and 0 with gradient 0 for a row of zeros.

    The row is first divided by its largest magnitude, so that squares neither overflow nor underflow;
    that factor cancels exactly, which is why it is taken as a constant in the gradient.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, torch.ones_like(largest), largest)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    zero = length == 0
    return x * torch.where(zero, 0.0, torch.where(zero, torch.ones_like(length), length).reciprocal())


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("x", x), ("y", y)):
        if not value.is_floating_point() or value.dim() < 2:
            raise InputError(
                f"{name} must be a floating tensor of shape (N, D), got {tuple(value.shape)} {value.dtype}"
            )
    if x.shape[-1] != y.shape[-1]:
        raise InputError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same last dimension")
    dtype = torch.promote_types(widen(x).dtype, widen(y).dtype)
    return x.to(dtype), y.to(dtype)


def inner_product(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Inner product of every row of x with every row of y: s_ij = ⟨x_i, y_j⟩.

    Args:
        x_ND: (N, D), floating.
        y_MD: (M, D), floating.

    Returns:
        (N, M), float32 (float64 if an input is).

    Raises:
        InputError: not floating, or the last dimensions differ.
    """
    with full_precision(x_ND):
        x_ND, y_MD = _pair(x_ND, y_MD)
        return x_ND @ y_MD.mT


def cosine(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Cosine of the angle between every row of x and every row of y: s_ij = ⟨x_i, y_j⟩ / (‖x_i‖ ‖y_j‖).

    A row of zeros has cosine 0 with everything and gets no gradient.

    Args:
        x_ND: (N, D), floating.
        y_MD: (M, D), floating.

    Returns:
        (N, M) in [−1, 1] up to rounding, float32 (float64 if an input is).

    Raises:
        InputError: not floating, or the last dimensions differ.
    """
    with full_precision(x_ND):
        x_ND, y_MD = _pair(x_ND, y_MD)
        return unit(x_ND) @ unit(y_MD).mT


def euclidean(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Euclidean distance between every row of x and every row of y: d_ij = ‖x_i − y_j‖₂ ≥ 0.

    A distance, so smaller is more similar; `contrast(similarity="euclidean")` scores with −d. Differences
    are formed directly, not through ‖x‖² + ‖y‖² − 2⟨x, y⟩, which loses small distances to cancellation.
    Where two rows are equal the gradient is 0 (a subgradient).

    Args:
        x_ND: (N, D), floating.
        y_MD: (M, D), floating.

    Returns:
        (N, M), float32 (float64 if an input is).

    Raises:
        InputError: not floating, or the last dimensions differ.
    """
    with full_precision(x_ND):
        x_ND, y_MD = _pair(x_ND, y_MD)
        return torch.cdist(x_ND, y_MD, compute_mode="donot_use_mm_for_euclid_dist")
