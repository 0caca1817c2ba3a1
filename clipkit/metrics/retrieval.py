"""Exact retrieval and classification accuracy, in memory-bounded chunks.

The one idea: the rank of a query is a count, so no sorting is needed. It is the number of gallery rows that
a stable sort by falling similarity would list before the best positive: those strictly more similar, and
those equally similar with a smaller row number. Counting ties this way makes a collapsed encoder, whose
similarities are all equal, score what chance gives it and not 100 %.

Shapes: N = queries, M = gallery rows, D = features; similarities are inner products, so pass normalised
rows for cosines.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.errors import InputError
from clipkit.metrics import checks

_SCORES = 1 << 24  # similarities held at once


@torch.no_grad()
def retrieval_ranks(query_ND: Any, gallery_MD: Any, query_ids: Any, gallery_ids: Any) -> Tensor:
    """Place of the best positive of each query in the gallery sorted by similarity, from 0.

    A gallery row is a positive when its id is the query's; a query may have several.

    Args:
        query_ND: (N, D) floating, tensor or numpy array.
        gallery_MD: (M, D) floating.
        query_ids: (N,) integers.
        gallery_ids: (M,) integers.

    Returns:
        (N,) int64 on the device of the queries. Ranks of disjoint slices of the queries may be
        concatenated, so several processes can share the work.

    Raises:
        InputError: shapes do not fit, a similarity is not a number, or a query has no positive in the
            gallery.
    """
    query_ND, gallery_MD = checks.two_features(query=query_ND, gallery=gallery_MD)
    device = query_ND.device
    query_id_N = checks.ids("query_ids", query_ids, query_ND.shape[0], device)
    gallery_id_M = checks.ids("gallery_ids", gallery_ids, gallery_MD.shape[0], device)
    place_M = torch.arange(gallery_MD.shape[0], device=device)
    ranks = torch.empty(query_ND.shape[0], dtype=torch.int64, device=device)
    step = max(1, _SCORES // gallery_MD.shape[0])
    for start in range(0, query_ND.shape[0], step):
        rows = slice(start, start + step)
        with torch.autocast(device.type, enabled=False):
            score_nM = query_ND[rows] @ gallery_MD.T
        positive_nM = query_id_N[rows, None] == gallery_id_M
        missing = ~positive_nM.any(1)
        if bool(missing.any()):
            at = start + int(missing.long().argmax())
            raise InputError(
                f"query {at} has id {int(query_id_N[at])}, which no row of the gallery has: "
                "leave out queries whose answer is not there"
            )
        if bool(score_nM.isnan().any()):
            raise InputError("a similarity is not a number: query or gallery holds nan or infinite values")
        best_n1 = score_nM.masked_fill(~positive_nM, -torch.inf).amax(1, keepdim=True)
        first_n1 = ((score_nM == best_n1) & positive_nM).long().argmax(1, keepdim=True)
        before_nM = (score_nM > best_n1) | ((score_nM == best_n1) & (place_M < first_n1))
        ranks[rows] = before_nM.sum(1)
    return ranks


def retrieval_recall(
    query_ND: Any, gallery_MD: Any, query_ids: Any, gallery_ids: Any, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Share of the queries with a positive among their k most similar gallery rows.

        recall@k = mean_i [ min_{j: id_j = id_i} rank_ij < k ]

    Args:
        query_ND: (N, D) floating, tensor or numpy array; normalised rows for cosines.
        gallery_MD: (M, D) floating.
        query_ids: (N,) integers.
        gallery_ids: (M,) integers; several rows may share an id, and any of them is a hit.
        ks: cut-offs ≥ 1.

    Returns:
        {"recall@1": …, …}, in [0, 1], exact; equal similarities rank by their gallery row.

    Raises:
        InputError: shapes do not fit, ks < 1, or a query has no positive in the gallery.
    """
    cutoffs = checks.cutoffs(ks)
    ranks = retrieval_ranks(query_ND, gallery_MD, query_ids, gallery_ids)
    return {f"recall@{k}": float((ranks < k).double().mean()) for k in cutoffs}


def zero_shot_accuracy(
    image_ND: Any, class_CD: Any, labels: Any, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of the images whose class is among the k class embeddings most similar to them.

    Args:
        image_ND: (N, D) floating, tensor or numpy array.
        class_CD: (C, D) floating, one embedding for each class.
        labels: (N,) integers in [0, C), the true classes.
        ks: cut-offs ≥ 1.

    Returns:
        {"accuracy@1": …, "accuracy@5": …}, in [0, 1], exact.

    Raises:
        InputError: shapes do not fit, ks < 1, or a label is not a class.
    """
    cutoffs = checks.cutoffs(ks)
    classes = checks.features("class", class_CD).shape[0]
    label_N = checks.ids("labels", labels, checks.features("image", image_ND).shape[0], torch.device("cpu"))
    if int(label_N.min()) < 0 or int(label_N.max()) >= classes:
        raise InputError(
            f"labels must be in [0, {classes}), got {int(label_N.min())} to {int(label_N.max())}"
        )
    ranks = retrieval_ranks(image_ND, class_CD, label_N, torch.arange(classes))
    return {f"accuracy@{k}": float((ranks < k).double().mean()) for k in cutoffs}
