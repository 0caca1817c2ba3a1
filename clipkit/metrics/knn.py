"""The weighted vote of nearest neighbours: what features are worth with nothing trained on top of them.

The one idea: similarity and place of a training row are packed into one integer whose order is "more similar
first, then the earlier row". No two are equal, so the k largest of any tile, and of any merge of tiles, are
the same rows on every device, and the (N, M) matrix is never held. A collapsed encoder, all of whose
similarities are equal, is judged by its first k rows: by chance.

Shapes: N queries, M training rows, n and m a tile of them, D features, K neighbours, C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import InputError
from clipkit.metrics import checks

_SCORES = 1 << 22  # similarities held at once
_TILE = 1 << 13  # training rows in a tile
_LOW = (1 << 32) - 1


@torch.no_grad()
def knn_neighbours(query_ND: Any, train_MD: Any, k: int = 200) -> tuple[Tensor, Tensor]:
    """The k training rows of highest cosine to each query, best first; equal ones by their place.

    Args:
        query_ND: (N, D) floating, tensor or numpy array; of any length, scaled to 1 inside.
        train_MD: (M, D) floating, M < 2^32.
        k: Neighbours ≥ 1; more than M are M.

    Returns:
        Their cosines, float32 (N, K), and places, int64 (N, K), on the device of the queries; K = min(k, M).

    Raises:
        InputError: Shapes do not fit, k < 1, or a similarity is not a number.
    """
    (k,) = checks.cutoffs([k])
    query_ND, train_MD = checks.two_features(query=query_ND, train=train_MD)
    query_ND, train_MD = F.normalize(query_ND, dim=1), F.normalize(train_MD, dim=1)
    rows = max(1, _SCORES // min(_TILE, len(train_MD)))
    keys_NK = torch.cat([_best_keys(part_nD, train_MD, k) for part_nD in query_ND.split(rows)])
    return _unpack(keys_NK)


def _best_keys(query_nD: Tensor, train_MD: Tensor, k: int) -> Tensor:
    """The k largest packed keys of each query, largest first."""
    best_nK = torch.empty(len(query_nD), 0, dtype=torch.int64, device=query_nD.device)
    for start in range(0, len(train_MD), _TILE):
        with torch.autocast(query_nD.device.type, enabled=False):
            cosine_nm = (query_nD @ train_MD[start : start + _TILE].T).float()
        if bool(cosine_nm.isnan().any()):
            raise InputError("a similarity is not a number: query or train holds nan or infinite values")
        keys_nm = torch.cat([best_nK, _pack(cosine_nm, start)], dim=1)
        best_nK = keys_nm.topk(min(k, keys_nm.shape[1]), dim=1).values
    return best_nK


def _pack(cosine_nm: Tensor, start: int) -> Tensor:
    """int64 keys: the float's bits, made to order like the float, above the place counted downwards."""
    bits_nm = (cosine_nm + 0.0).view(torch.int32)  # − 0 becomes 0
    ordered_nm = bits_nm ^ ((bits_nm >> 31) & 0x7FFFFFFF)
    place_m = torch.arange(start, start + cosine_nm.shape[1], device=cosine_nm.device)
    return (ordered_nm.to(torch.int64) << 32) | (_LOW - place_m)


def _unpack(keys_NK: Tensor) -> tuple[Tensor, Tensor]:
    ordered_NK = (keys_NK >> 32).to(torch.int32)
    bits_NK = ordered_NK ^ ((ordered_NK >> 31) & 0x7FFFFFFF)
    return bits_NK.view(torch.float32), _LOW - (keys_NK & _LOW)


@torch.no_grad()
def knn_predict(
    query_ND: Any, train_MD: Any, train_labels: Any, *, k: int = 200, temperature: float = 0.07
) -> Tensor:
    """The class of each query by the vote of its neighbours.

        class_i = argmax_c Σ_{j ∈ K(i), y_j = c} exp(cos_ij / τ)

    k = 200 and τ = 0.07 are the paper's; lightly and the MoCo code for CIFAR take τ = 0.1.

    Args:
        query_ND: (N, D) floating, tensor or numpy array; of any length, scaled to 1 inside.
        train_MD: (M, D) floating.
        train_labels: (M,) integers ≥ 0.
        k: Neighbours ≥ 1; more than M are M.
        temperature: τ > 0.

    Returns:
        (N,) int64 on the device of the queries; the smallest of classes whose votes are equal.

    Raises:
        InputError: Shapes do not fit, k < 1, τ ≤ 0, or a similarity is not a number.

    References:
        Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section
        3.4.
    """
    return _vote(*_neighbours_and_labels(query_ND, train_MD, train_labels, k), temperature)


def _neighbours_and_labels(query_ND: Any, train_MD: Any, train_labels: Any, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (N, K) and labels (N, K) of the nearest training rows."""
    label_M = checks.ids("train_labels", train_labels, len(train_MD), torch.device("cpu"))
    if label_M.numel() and int(label_M.min()) < 0:
        raise InputError(f"train_labels must be >= 0, got {int(label_M.min())}")
    cosine_NK, place_NK = knn_neighbours(query_ND, train_MD, k)
    return cosine_NK, label_M.to(place_NK.device)[place_NK]


def _vote(cosine_NK: Tensor, label_NK: Tensor, temperature: float) -> Tensor:
    """The class of the largest sum of weights."""
    if not temperature > 0:
        raise InputError(f"temperature must be > 0, got {temperature}")
    # relative to the best neighbour, so that no temperature overflows
    weight_NK = ((cosine_NK - cosine_NK[:, :1]).double() / temperature).exp()
    predicted = []
    classes = int(label_NK.max()) + 1
    step = max(1, _SCORES // classes)
    for weight_nK, label_nK in zip(weight_NK.split(step), label_NK.split(step), strict=True):
        votes_nC = weight_nK.new_zeros(len(weight_nK), classes).scatter_add_(1, label_nK, weight_nK)
        # a sum's last bits depend on its order, which a GPU does not keep: equal votes are equal as float32
        predicted.append(votes_nC.float().argmax(1))
    return torch.cat(predicted)


@torch.no_grad()
def knn_accuracy(
    query_ND: Any,
    query_labels: Any,
    train_MD: Any,
    train_labels: Any,
    *,
    ks: Sequence[int] = (200,),
    temperature: float = 0.07,
) -> dict[str, float]:
    """Share of the queries whose class `knn_predict` finds, for each number of neighbours.

    Args:
        query_ND: (N, D) floating, tensor or numpy array.
        query_labels: (N,) integers; a label that no training row has is never right.
        train_MD: (M, D) floating.
        train_labels: (M,) integers ≥ 0.
        ks: Numbers of neighbours ≥ 1; more than M are M, and the name says so.
        temperature: τ > 0.

    Returns:
        {"knn@200": …, …}, in [0, 1]. With M = 50 training rows k = 200 is {"knn@50": …}.

    Raises:
        InputError: As `knn_predict`.
    """
    wanted = checks.cutoffs(ks)
    cosine_NK, label_NK = _neighbours_and_labels(query_ND, train_MD, train_labels, max(wanted))
    truth_N = checks.ids("query_labels", query_labels, len(label_NK), label_NK.device)
    return {
        f"knn@{k}": float((_vote(cosine_NK[:, :k], label_NK[:, :k], temperature) == truth_N).double().mean())
        for k in sorted({min(k, label_NK.shape[1]) for k in wanted}, reverse=True)
    }
