"""How many dimensions features really use, without any label: their singular values, and their spread.

A collapse shows here before it shows in accuracy. `rank_me` sees the collapse onto few dimensions,
`embedding_std` the collapse onto one point.

Shapes: N samples, D features, R = min(N, D).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import InputError
from clipkit.metrics import checks


@torch.no_grad()
def rank_me(features_ND: Any, eps: float = 1e-7) -> float:
    """RankMe: the exponential of the entropy of the singular values, a smooth count of used dimensions.

        p_k = σ_k / Σ_j σ_j + ε,   RankMe = exp(−Σ_k p_k log p_k),   k = 1 … R

    The features are neither centred nor normalised. With ε = 0 this is the effective rank of Roy and Vetterli
    2007, which lies in [1, R]; ε adds a little for every dimension that is not used. No more than R
    dimensions can show: give more samples than features (the paper takes 25,600).

    Args:
        features_ND: (N, D) floating, tensor or numpy array.
        eps: ε ≥ 0.

    Returns:
        About 1 (one direction, or nothing but zeros) to about R (all directions alike).

    Raises:
        InputError: Not (N, D) floating, or a value is not finite.

    References:
        Garrido et al. 2023, "RankMe: assessing the downstream performance of pretrained self-supervised
        representations by their rank", eq. 1 and 2; Roy and Vetterli 2007, "The effective rank: a measure of
        effective dimensionality".
    """
    x_ND = _finite(features_ND).double()
    sigma_R = torch.linalg.svdvals(x_ND)
    total = sigma_R.sum()
    p_R = sigma_R / total + eps if total > 0 else torch.full_like(sigma_R, eps)
    return float(torch.special.entr(p_R).sum().exp())


@torch.no_grad()
def embedding_std(features_ND: Any) -> float:
    """√D × the mean over dimensions of the standard deviation of the unit features over the samples.

    Args:
        features_ND: (N, D) floating, N ≥ 2, tensor or numpy array; of any length.

    Returns:
        Near 1 where they fill the sphere, 0 where all are one.

    Raises:
        InputError: Not (N, D) floating, fewer than 2 rows, or a value is not finite.

    References:
        Chen and He 2021, "Exploring simple Siamese representation learning", section 4.1, figure 2.
    """
    x_ND = _finite(features_ND)
    if len(x_ND) < 2:
        raise InputError("embedding_std needs 2 rows at least")
    return float(F.normalize(x_ND, dim=1).std(dim=0).mean() * x_ND.shape[1] ** 0.5)


def _finite(features_ND: Any) -> Tensor:
    x_ND = checks.features("features", features_ND)
    if not bool(x_ND.isfinite().all()):
        raise InputError("features hold nan or infinite values")
    return x_ND
