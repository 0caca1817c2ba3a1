"""The weighted vote of neighbours against float64 loops, scikit-learn and lightly; tiles and ties."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from clipkit.errors import InputError
from clipkit.metrics import knn, knn_accuracy, knn_neighbours, knn_predict

with warnings.catch_warnings():  # what lightly warns about at import is its own
    warnings.simplefilter("ignore")
    from lightly.utils.benchmarking import knn_predict as lightly_knn


def naive_vote(query: np.ndarray, train: np.ndarray, labels: Any, k: int, temperature: float) -> int:
    """One query, in float64, by sorting all similarities."""
    cosine = np.array([q @ query / (np.linalg.norm(q) * np.linalg.norm(query)) for q in train])
    votes: dict[Any, Any] = {}
    for place in np.argsort(-cosine, kind="stable")[:k]:
        votes[labels[place]] = votes.get(labels[place], 0.0) + np.exp(cosine[place] / temperature)
    return max(sorted(votes), key=lambda label: votes[label])


def random_set(seed: int, n: int, m: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    return g.normal(size=(n, 5)), g.normal(size=(m, 5)), g.integers(0, classes, m)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), n=st.integers(1, 9), m=st.integers(1, 30), k=st.integers(1, 35),
    scores=st.integers(1, 40), tile=st.integers(1, 40),
)  # fmt: skip
def test_the_vote_is_that_of_plain_loops_for_any_tiles(
    seed: int, n: int, m: int, k: int, scores: int, tile: int
) -> None:
    query, train, labels = random_set(seed, n, m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_SCORES", scores)
        patch.setattr(knn, "_TILE", tile)
        predicted = knn_predict(query, train, labels, k=k, temperature=0.5)
    assert predicted.tolist() == [naive_vote(row, train, labels, k, 0.5) for row in query]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 20))
def test_order_of_rows_and_length_of_features_change_nothing(seed: int, k: int) -> None:
    query, train, labels = random_set(seed, 8, 20)
    g = np.random.default_rng(seed + 1)
    order, length = g.permutation(20), g.uniform(0.1, 10, (20, 1))
    expected = knn_predict(query, train, labels, k=k)
    assert torch.equal(knn_predict(3 * query, (length * train)[order], labels[order], k=k), expected)


def test_scikit_learn_agrees() -> None:
    query, train, labels = random_set(0, 200, 300, classes=7)
    temperature = 0.1

    def vote(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    reference = KNeighborsClassifier(
        n_neighbors=25,
        metric="cosine",
        weights=vote,  # pyright: ignore[reportArgumentType] (a callable is allowed)
    ).fit(train, labels)
    ours = knn_predict(query, train, labels, k=25, temperature=temperature)
    assert ours.tolist() == reference.predict(query).tolist()


def test_lightly_agrees() -> None:
    query, train, labels = (torch.as_tensor(x) for x in random_set(1, 200, 300, classes=7))
    query, train = F.normalize(query.float(), dim=1), F.normalize(train.float(), dim=1)
    theirs = lightly_knn(query, train.T, labels, num_classes=7, knn_k=40, knn_t=0.1)[:, 0]
    assert torch.equal(knn_predict(query, train, labels, k=40, temperature=0.1), theirs)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), m=st.integers(1, 15), k=st.integers(1, 15), tile=st.integers(1, 15))
def test_equal_similarities_are_taken_in_the_order_of_rows(seed: int, m: int, k: int, tile: int) -> None:
    train = np.random.default_rng(seed).choice([-1.0, 1.0], (m, 1))  # every cosine is 1 or − 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_TILE", tile)
        cosine, place = knn_neighbours(np.ones((2, 1)), train, k)
    expected = np.argsort(-train[:, 0], kind="stable")[:k].tolist()
    assert place.tolist() == [expected, expected]
    assert cosine[0].tolist() == train[expected, 0].tolist()


def test_orthogonal_rows_of_either_sign_of_zero_are_equal() -> None:
    train = torch.tensor([[-0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    _, place = knn_neighbours(torch.tensor([[1.0, -0.0], [1.0, 0.0]]), train, 4)
    assert place.tolist() == [[2, 0, 1, 3], [2, 0, 1, 3]]


def test_a_collapsed_encoder_scores_chance() -> None:
    labels = torch.arange(40) % 4
    assert knn_accuracy(torch.ones(40, 3), labels, torch.ones(40, 3), labels, ks=(8,)) == {"knn@8": 0.25}


def test_more_neighbours_than_rows_are_all_rows_and_the_name_says_so() -> None:
    query, train, labels = random_set(2, 6, 10)
    figures = knn_accuracy(query, [0] * 6, train, labels, ks=(200, 100, 3))
    assert list(figures) == ["knn@10", "knn@3"]
    assert figures["knn@10"] == np.mean([naive_vote(q, train, labels, 10, 0.07) == 0 for q in query])


def test_a_label_that_training_lacks_is_never_right() -> None:
    x = torch.eye(4)
    assert knn_accuracy(x, [0, 1, 2, -1], x, [0, 1, 2, 3], ks=(1,)) == {"knn@1": 0.75}


def test_the_lowest_temperature_is_the_nearest_neighbour_and_overflows_nowhere() -> None:
    query, train, labels = random_set(3, 30, 30)
    nearest = knn_predict(query, train, labels, k=1)
    assert torch.equal(knn_predict(query, train, labels, k=30, temperature=1e-6), nearest)


def test_half_precision_and_autocast() -> None:
    query, train, labels = (torch.as_tensor(x) for x in random_set(4, 30, 50))
    query, train = query.bfloat16(), train.bfloat16()
    expected = knn_predict(query.float(), train.float(), labels, k=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn_predict(query, train, labels, k=9), expected)


X, Y = torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn_predict(X, X[:, :2], Y), r"query \(3, 3\) and train \(3, 2\)"),
        (lambda: knn_predict(X, X, Y[:2]), r"train_labels must be integers of shape \(3,\)"),
        (lambda: knn_predict(X, X, Y - 1), r"train_labels must be >= 0, got -1"),
        (lambda: knn_predict(X, X, Y, k=0), r"ks must be integers >= 1"),
        (lambda: knn_predict(X, X, Y, temperature=0), r"temperature must be > 0"),
        (lambda: knn_predict(X * torch.nan, X, Y), r"not a number"),
        (lambda: knn_predict(X / 0, X, Y), r"not a number"),
        (lambda: knn_accuracy(X, Y[:1], X, Y), r"query_labels must be integers of shape \(3,\)"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
