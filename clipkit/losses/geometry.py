"""What a good embedding looks like on the sphere: alignment of positive pairs, uniformity of all rows.

Both are measures as well as losses; their weighted sum stands where a contrastive loss stands. Rows are
L2-normalised inside; a row of zeros has no direction and stays zero, without a gradient.

Shapes: N = rows, D = features.
"""

import math

import torch
from torch import Tensor

from clipkit.errors import InputError
from clipkit.losses import checks
from clipkit.losses.primitive import contrast
from clipkit.losses.similarity import full_precision, unit, widen


def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> Tensor:
    """How far apart the two sides of a positive pair are; 0 is best.

        A = mean_i ‖x̂_i − ŷ_i‖₂^α

    With α = 2 the value is that of `alignment_loss` (BYOL's), which gives its second argument no gradient;
    this gives one to both, and so needs something against collapse beside it, e.g. `uniformity`.

    Args:
        x: (N, D), floating.
        y: (N, D); row i belongs to row i of `x`.
        alpha: α > 0.

    Returns:
        Scalar in [0, 2^α], float32 (float64 if an input is).

    Raises:
        InputError: shapes differ, there are no rows, or α ≤ 0.

    References:
        Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity
        on the Hypersphere", eq. 5.
    """
    checks.same_shape(x=checks.features("x", x), y=checks.features("y", y))
    checks.fits("x", x, "y", y)
    checks.not_empty("x", x)
    with full_precision(x):
        dtype = torch.promote_types(widen(x).dtype, widen(y).dtype)
        x_ND, y_ND = x.to(dtype), y.to(dtype)
        power = checks.scalar("alpha", alpha, x_ND.detach(), above=0.0)
        distance_N = torch.linalg.vector_norm(unit(x_ND) - unit(y_ND), dim=1)
        same_N = distance_N == 0  # for α < 1 the slope of d^α is infinite there: take 0
        return torch.where(same_N, 0.0, torch.where(same_N, 1.0, distance_N) ** power).mean()


def uniformity(x: Tensor, *, t: float = 2.0) -> Tensor:
    """How evenly rows cover the sphere: log of the mean Gaussian potential of all pairs; lower is better.

        U = log mean_{i<j} exp(−t ‖x̂_i − x̂_j‖²)

    One call of `contrast`, whose tiles hold no N × N matrix: with ‖x̂_i − x̂_j‖² = 2 − 2⟨x̂_i, x̂_j⟩, and a zero
    vector as every row's positive (its cosine is 0), the loss of row i is log Σ_{j≠i} exp(2t ⟨x̂_i, x̂_j⟩).

    Args:
        x: (N, D), floating, N ≥ 2.
        t: t > 0.

    Returns:
        Scalar in [−4t, 0], float32 (float64 if `x` is); 0 for collapsed rows. A row of zeros counts as
        orthogonal to all others.

    Raises:
        InputError: fewer than 2 rows, or t ≤ 0.

    References:
        Wang & Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity
        on the Hypersphere", eq. 6, as in the authors' code: over pairs of different rows, with log.
    """
    n = checks.features("x", x).shape[0]
    if n < 2:
        raise InputError(f"x {checks.describe(x)} must have at least 2 rows: uniformity is about pairs")
    double_t = 2 * checks.scalar("t", t, widen(x).detach(), above=0.0)
    row = torch.arange(n, device=x.device)
    per_row_N = contrast(
        x,
        torch.zeros_like(x),
        paired=True,
        q_id=row,
        negatives=x,
        negative_id=row,
        denominator="neg",
        scale=double_t,
    ).per_row
    return torch.logsumexp(per_row_N, 0) - math.log(n * (n - 1)) - double_t
