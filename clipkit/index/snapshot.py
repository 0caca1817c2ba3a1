"""One snapshot of an index in memory: vectors in faiss, items in SQLite, both checked when opened.

A snapshot never changes, so any number of threads may search it, and what one search found can be looked up
afterwards in the same `Snapshot` even when the index has moved on. Vectors and queries are normalised to
length 1 here, so a similarity is a cosine whatever came in.

n: queries, N: vectors in the index, D: dimension, k: results per query.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from clipkit.errors import ArtifactError, InputError, NotFoundError
from clipkit.files import MANIFEST, read_manifest, sha256_file
from clipkit.index.engines import ENGINES, read_faiss, write_faiss
from clipkit.index.items import ITEMS, Items

VECTORS = "image.index"
MAX_K = 1000


def check_k(k: int) -> int:
    """`k` when it is a number of results that may be asked for. Raises: InputError."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        raise InputError(f"k is {k!r}", hint=f"ask for 1 to {MAX_K} results")
    return int(k)


def unit_vectors(vectors: ArrayLike, dim: int, name: str = "vectors") -> np.ndarray:
    """Vectors as (n, D) float32 of length 1, in C order.

    Args:
        vectors: (n, D) real numbers.
        dim: D that is expected.
        name: What to call them in a message.

    Raises:
        InputError: Another shape, what is no real number, NaN, infinity, or a vector of length 0.
    """
    try:
        array = np.asarray(vectors)
    except ValueError as error:
        raise InputError(f"{name} are no rectangular array of numbers: {error}") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{name} are of type {array.dtype}, not real numbers")
    if array.ndim != 2 or array.shape[1] != dim:
        raise InputError(f"{name} have shape {array.shape}", hint=f"expected (n, {dim})")
    wide_nD = array.astype(np.float64)  # squares of large float32 values overflow in float32
    lengths_n = np.linalg.norm(wide_nD, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths_n) | (lengths_n == 0))
    if bad.size:
        what = "length 0" if lengths_n[bad[0], 0] == 0 else "a value that is not finite"
        raise InputError(f"row {bad[0]} of {name} has {what}")
    return np.ascontiguousarray(wide_nD / lengths_n, dtype=np.float32)


class Snapshot:
    """An immutable set of vectors with their items.

    Args:
        folder: The snapshot's folder.
        verify: Compare every file's SHA-256 with the manifest before anything reads it.

    Raises:
        ArtifactError: Something is missing, damaged, or not what the manifest says.
        DependencyError: faiss is not installed.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_manifest(folder, "index", verify=verify)
        missing = {"model", "dim", "rows", "engine", "next_id", "metric"} - set(self.manifest)
        if missing:
            raise ArtifactError(f"the manifest of {folder} lacks {', '.join(sorted(missing))}")
        self.digest = sha256_file(folder / MANIFEST)
        self.dim: int = self.manifest["dim"]
        rows: int = self.manifest["rows"]
        self._faiss = read_faiss(folder / VECTORS, dim=self.dim, rows=rows)
        from faiss import vector_to_array

        self.ids: np.ndarray = vector_to_array(self._faiss.id_map)
        self.ids.flags.writeable = False
        self._order_N = np.argsort(self.ids)
        self.items = Items(folder / ITEMS, rows)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, vectors: ArrayLike, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The `k` most similar vectors to each query; see `Index.search`."""
        query_nD = unit_vectors(vectors, self.dim)
        width = min(check_k(k), len(self))
        similarities_nk = np.full((len(query_nD), k), -np.inf, dtype=np.float32)
        ids_nk = np.full((len(query_nD), k), -1, dtype=np.int64)
        if width and len(query_nD):
            similarities_nk[:, :width], ids_nk[:, :width] = self._top(query_nD, width)
        return similarities_nk, ids_nk

    def _top(self, query_nD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first k by descending similarity, then ascending id.

        faiss keeps any of several equal vectors at the cut, so more are fetched until the cut falls between
        two different similarities.
        """
        fetch = min(len(self), k + 1)
        while True:
            found_nf, ids_nf = self._faiss.search(query_nD, fetch)
            order_nf = np.lexsort((ids_nf, -found_nf), axis=1)
            found_nf = np.take_along_axis(found_nf, order_nf, axis=1)
            ids_nf = np.take_along_axis(ids_nf, order_nf, axis=1)
            if fetch == len(self) or (found_nf[:, k - 1] > found_nf[:, -1]).all():
                return found_nf[:, :k], ids_nf[:, :k]
            fetch = min(len(self), 4 * fetch)

    def rows(self, ids: ArrayLike) -> np.ndarray:
        """The rows at which faiss keeps some ids. Raises: NotFoundError that lists the unknown ones."""
        wanted_n = check_ids(ids)
        if not len(self):
            unknown = np.ones(len(wanted_n), dtype=bool)
            rows_n = wanted_n
        else:
            places_n = np.searchsorted(self.ids, wanted_n, sorter=self._order_N)
            rows_n = self._order_N[np.minimum(places_n, len(self) - 1)]
            unknown = self.ids[rows_n] != wanted_n
        if unknown.any():
            raise NotFoundError(f"no item with id {listed(wanted_n[unknown])}")
        return rows_n

    def vectors(self, ids: ArrayLike) -> np.ndarray:
        """(n, D) float32: the stored vectors of some ids. Raises: NotFoundError."""
        rows_n = self.rows(ids)
        if not len(rows_n):
            return np.zeros((0, self.dim), dtype=np.float32)
        return self._faiss.index.reconstruct_batch(rows_n)

    def all_vectors(self) -> np.ndarray:
        """(N, D) float32: every stored vector, in the order of `ids`."""
        if not len(self):
            return np.zeros((0, self.dim), dtype=np.float32)
        return self._faiss.index.reconstruct_n(0, len(self))


def check_ids(ids: ArrayLike) -> np.ndarray:
    """Ids as (n,) int64. Raises: InputError for what is no list of whole numbers."""
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise InputError(f"ids are no list of whole numbers: {error}") from error
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max:
        raise InputError(f"ids have type {array.dtype} and shape {array.shape}, not a list of whole numbers")
    return array.astype(np.int64)


def listed(ids: Sequence[int] | np.ndarray) -> str:
    """Ids as words for a message: the first ten, and how many more."""
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    return ", ".join(str(int(key)) for key in ids[:10]) + more


def write_vectors(folder: Path, engine: str, vectors_ND: np.ndarray, ids_N: np.ndarray) -> None:
    """Build the faiss index of a new snapshot and write it. Raises: NotFoundError for an unknown engine."""
    spec = ENGINES.get(engine)
    write_faiss(spec.build(spec.config(), vectors_ND, ids_N), folder / VECTORS)
