"""Searching: exact against numpy, stable, padded, checked, and from many threads at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.errors import InputError, MismatchError, NotFoundError
from clipkit.index import Index, build_index

Write = Callable[..., Path]


@pytest.mark.parametrize("k", [1, 7, 200])
def test_equals_numpy(index_path: Path, k: int) -> None:
    queries = np.random.default_rng(1).standard_normal((40, 16)).astype(np.float32) * 9
    with Index.open(index_path) as index:
        similarities, ids = index.search(queries, k)
        exact = queries @ index.vectors(range(200)).T / np.linalg.norm(queries, axis=1, keepdims=True)
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(exact, expected, axis=1), atol=1e-6)
    assert similarities.dtype == np.float32
    assert ids.dtype == np.int64


def test_fewer_than_k_are_padded(tmp_path: Path, vectors: np.ndarray, write_embeddings: Write) -> None:
    with Index.open(build_index(write_embeddings(tmp_path / "e", vectors[:3]), tmp_path / "i")) as index:
        similarities, ids = index.search(vectors[:2], 5)
        assert (ids[:, 3:] == -1).all()
        assert np.isneginf(similarities[:, 3:]).all()
        assert {*ids[0, :3].tolist()} == {0, 1, 2}
        nothing = index.search(np.zeros((0, 16), dtype=np.float32), 5)
        assert nothing[0].shape == nothing[1].shape == (0, 5)


def test_ties_come_by_ascending_id(tmp_path: Path, write_embeddings: Write) -> None:
    """Also at the cut, where faiss by itself keeps any of the equal ones."""
    same = np.tile([0.6, 0.8], (40, 1))
    other = np.tile([1.0, 0.0], (5, 1))
    ids = np.random.default_rng(2).permutation(1000)[:45].tolist()
    source = write_embeddings(tmp_path / "e", np.concatenate([same, other]), ids=ids)
    with Index.open(build_index(source, tmp_path / "i")) as index:
        for k in (1, 3, 10, 40):
            np.testing.assert_array_equal(index.search([[0.6, 0.8]], k)[1][0], sorted(ids[:40])[:k])
        np.testing.assert_array_equal(index.search([[0.6, 0.8]], 42)[1][0, 40:], sorted(ids[40:])[:2])


def test_large_and_other_number_types(index_path: Path, vectors: np.ndarray) -> None:
    with Index.open(index_path) as index:
        expected = index.search(vectors[:2], 5)[1]
        for queries in (vectors[:2].astype(np.float64) * 1e30, (vectors[:2] * 1e37).tolist()):
            np.testing.assert_array_equal(index.search(queries, 5)[1], expected)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.ones(16), r"shape \(16,\).*expected \(n, 16\)"),
        (np.ones((1, 15)), r"shape \(1, 15\)"),
        (np.full((1, 16), np.nan), "row 0 of vectors has a value that is not finite"),
        (np.full((1, 16), np.inf), "not finite"),
        (np.zeros((1, 16)), "row 0 of vectors has length 0"),
        (np.full((1, 16), "x"), "not real numbers"),
        (np.ones((1, 16), dtype=bool), "not real numbers"),
        ([[1.0], [1.0, 2.0]], "no rectangular array"),
    ],
)
def test_bad_queries(index_path: Path, queries: Any, message: str) -> None:
    with Index.open(index_path) as index, pytest.raises(InputError, match=message):
        index.search(queries, 3)


@pytest.mark.parametrize("k", [0, -1, 1001, True, 2.0, "3"])
def test_bad_k(index_path: Path, vectors: np.ndarray, k: Any) -> None:
    with Index.open(index_path) as index, pytest.raises(InputError, match=r"k is .*1 to 1000"):
        index.search(vectors[:1], k)


def test_items_and_vectors_by_id(index_path: Path) -> None:
    with Index.open(index_path) as index:
        assert [item["caption"] for item in index.items([5, 1, 5])] == ["picture 5", "picture 1", "picture 5"]
        assert index.thumbnail(9) == b"picture 9"
        assert index.vectors([3, 3]).shape == (2, 16)
        assert index.vectors([]).shape == (0, 16)
        assert len(index) == 200
        assert index.dim == 16
        with pytest.raises(NotFoundError, match="no item with id 200, -1"):
            index.vectors([3, 200, -1])
        with pytest.raises(NotFoundError, match="no item with id 200"):
            index.items([200])
        with pytest.raises(NotFoundError, match="no item with id -1"):
            index.thumbnail(-1)
        with pytest.raises(ValueError, match="read-only"):
            index.ids[0] = 3


def test_check_model(index_path: Path) -> None:
    class Model:
        def __init__(self, fingerprint: str) -> None:
            self.fingerprint = fingerprint

    with Index.open(index_path) as index:
        index.check_model(Model("f" * 64))
        with pytest.raises(MismatchError, match=r"made with a-model \(fingerprint ffffffffffff\).*0000"):
            index.check_model(Model("0" * 64))


def test_many_threads_while_one_writes(index_path: Path, vectors: np.ndarray) -> None:
    """What a search finds in a snapshot can be looked up in it, whatever is written meanwhile."""
    stop = threading.Event()
    index = Index.open(index_path)

    def read(seed: int) -> int:
        rng, count = np.random.default_rng(seed), 0
        while not stop.is_set() or count == 0:
            view = index.current
            wanted = int(rng.integers(200))
            similarities, ids = view.search(vectors[[wanted]], 3)
            captions = [item["caption"] for item in view.items.metadata(ids[0])]
            assert captions[0] == f"picture {wanted}"
            assert similarities[0, 0] > 0.999
            count += 1
        return count

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, seed) for seed in range(8)]
        try:
            for _ in range(4):
                new = index.add(-vectors[:3], [{"caption": "new"}] * 3)
                index.delete(new)
        finally:
            stop.set()
        assert all(reader.result() > 0 for reader in readers)
    assert len(index) == 200
