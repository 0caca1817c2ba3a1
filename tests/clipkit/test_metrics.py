"""Recall and accuracy against a plain stable sort, chunk by chunk, with ties and several positives."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.metrics import retrieval as metrics
from clipkit.metrics import retrieval_ranks, retrieval_recall, zero_shot_accuracy


def sorted_ranks(query: np.ndarray, gallery: np.ndarray, q_id: np.ndarray, g_id: np.ndarray) -> list[int]:
    ranks = []
    for q, wanted in zip(query, q_id, strict=True):
        order = np.argsort(-(gallery @ q), kind="stable")
        ranks.append(int(np.flatnonzero(g_id[order] == wanted)[0]))
    return ranks


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 12), m=st.integers(1, 12), chunk=st.integers(1, 40))
def test_ranks_are_those_of_a_stable_sort(seed: int, n: int, m: int, chunk: int) -> None:
    g = np.random.default_rng(seed)
    query = g.integers(-2, 3, (n, 3)).astype(np.float64)  # small integers: plenty of exact ties
    gallery = g.integers(-2, 3, (m, 3)).astype(np.float64)
    g_id = g.integers(0, 4, m)
    q_id = g.choice(g_id, n)
    expected = sorted_ranks(query, gallery, q_id, g_id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_SCORES", chunk)
        assert retrieval_ranks(query, gallery, q_id, g_id).tolist() == expected
        recall = retrieval_recall(query, gallery, q_id, g_id, ks=(1, 3))
    assert recall == {f"recall@{k}": pytest.approx(np.mean(np.array(expected) < k)) for k in (1, 3)}


def test_perfect_and_collapsed_encoders() -> None:
    x, ids = torch.eye(20), torch.arange(20)
    assert retrieval_recall(x, x, ids, ids) == {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0}
    same = torch.ones(20, 4)
    assert retrieval_recall(same, same, ids, ids) == {"recall@1": 0.05, "recall@5": 0.25, "recall@10": 0.5}


def test_any_of_several_positives_is_a_hit() -> None:
    gallery = np.eye(4, dtype=np.float32)
    assert retrieval_recall(gallery[2:3], gallery, [7], [7, 8, 7, 9], ks=(1,)) == {"recall@1": 1.0}


def test_narrow_dtypes_and_autocast() -> None:
    torch.manual_seed(0)
    x, ids = torch.randn(30, 8), torch.arange(30)
    expected = retrieval_ranks(x.bfloat16().float(), x.bfloat16().float(), ids, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(retrieval_ranks(x.bfloat16(), x.bfloat16(), ids, ids), expected)


def test_zero_shot_accuracy() -> None:
    classes = np.eye(3)
    images = np.array([[0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.5, 0.4, 0.3]])
    assert zero_shot_accuracy(images, classes, [0, 1, 2], ks=(1, 2, 3)) == {
        "accuracy@1": pytest.approx(1 / 3),
        "accuracy@2": pytest.approx(2 / 3),
        "accuracy@3": 1.0,
    }


X, IDS = np.eye(3), np.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_recall(X, X[:, :2], IDS, IDS), r"query \(3, 3\) and gallery \(3, 2\)"),
        (lambda: retrieval_recall(X[0], X, IDS, IDS), r"query must be floating.*got \(3,\)"),
        (lambda: retrieval_recall(X[:0], X, IDS[:0], IDS), r"query must be floating.*got \(0, 3\)"),
        (lambda: retrieval_recall(X, X, IDS[:2], IDS), r"query_ids must be integers of shape \(3,\)"),
        (lambda: retrieval_recall(X, X, IDS, IDS.astype(float)), r"gallery_ids must be integers"),
        (lambda: retrieval_recall(X, X, IDS + 1, IDS), r"query 2 has id 3, which no row"),
        (lambda: retrieval_recall(X * np.nan, X, IDS, IDS), r"not a number"),
        (lambda: retrieval_recall(X, X, IDS, IDS, ks=(0,)), r"ks must be integers >= 1"),
        (lambda: zero_shot_accuracy(X, X, [0, 1, 3]), r"labels must be in \[0, 3\), got 0 to 3"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
