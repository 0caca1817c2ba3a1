"""Ranks and spreads of features against their definitions, and what must not change them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.metrics import embedding_std, rank_me


def naive_rank(features: np.ndarray, eps: float) -> float:
    """By the eigenvalues of the Gram matrix, one by one."""
    x = features.astype(np.float64)
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    sigma = [math.sqrt(max(value, 0.0)) for value in np.linalg.eigvalsh(gram)]
    entropy = 0.0
    for value in sigma:
        p = value / sum(sigma) + eps
        entropy -= p * math.log(p)
    return math.exp(entropy)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), n=st.integers(2, 12), d=st.integers(1, 12))
def test_rank_is_that_of_plain_loops(seed: int, n: int, d: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d))
    assert rank_me(x) == pytest.approx(naive_rank(x, 1e-7), rel=1e-5)
    assert 1 - 1e-9 <= rank_me(x, eps=0) <= min(n, d) + 1e-9


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_order_scale_and_rotation_change_no_rank(seed: int, scale: float) -> None:
    g = np.random.default_rng(seed)
    x = g.normal(size=(12, 5))
    rotation, _ = np.linalg.qr(g.normal(size=(5, 5)))
    changed = scale * x[g.permutation(12)] @ rotation
    assert rank_me(changed) == pytest.approx(rank_me(x), rel=1e-9)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_order_of_rows_and_their_lengths_change_no_spread(seed: int) -> None:
    g = np.random.default_rng(seed)
    x = g.normal(size=(12, 5))
    changed = (g.uniform(0.1, 10, (12, 1)) * x)[g.permutation(12)]
    assert embedding_std(changed) == pytest.approx(embedding_std(x), rel=1e-9)


def test_known_ranks() -> None:
    assert rank_me(torch.eye(8)) == pytest.approx(8, rel=1e-4)
    assert rank_me(torch.ones(8, 4)) == pytest.approx(1, rel=1e-4)
    assert rank_me(torch.zeros(8, 4)) == pytest.approx(1, rel=1e-4)
    two_equal = torch.zeros(6, 6)
    two_equal[0, 0] = two_equal[1, 1] = 3.0
    assert rank_me(two_equal, eps=0) == pytest.approx(2)


def test_known_spreads() -> None:
    assert embedding_std(torch.ones(8, 4)) == 0
    torch.manual_seed(0)
    assert embedding_std(torch.randn(4000, 64)) == pytest.approx(1, abs=0.02)
    x = np.random.default_rng(0).normal(size=(9, 3))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert embedding_std(x) == pytest.approx(unit.std(axis=0, ddof=1).mean() * math.sqrt(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_me(torch.ones(3)), r"features must be floating.*got \(3,\)"),
        (lambda: rank_me(torch.tensor([[1.0, torch.nan]])), r"nan or infinite"),
        (lambda: embedding_std(torch.tensor([[torch.inf, 0.0]] * 2)), r"nan or infinite"),
        (lambda: embedding_std(torch.ones(1, 3)), r"2 rows"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
