"""The index engines: which faiss structure holds the vectors.

An engine is a `Spec` whose `build(config, vectors_ND, ids_N)` returns a faiss index that answers with the
ids it was given and measures by inner product. `flat` compares with every vector: exact, nothing to train,
and fast enough to some hundred thousand vectors. faiss is imported here and nowhere else, when first used,
because it comes from an extra (`clipkit[cpu]` or `clipkit[gpu]`) and because `import clipkit` must not pay
for it.

N: vectors, D: dimension.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from clipkit.config import Config
from clipkit.errors import ArtifactError, DependencyError
from clipkit.registry import Registry, Spec

GROUP = "clipkit.index_engines"


def load_faiss() -> ModuleType:
    """The faiss module. Raises: DependencyError when neither faiss-cpu nor faiss-gpu is installed."""
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            f"the index needs faiss, which cannot be imported: {error}",
            hint="pip install 'clipkit[cpu]', or 'clipkit[gpu]' on a machine with an NVIDIA GPU; never both",
        ) from error
    return faiss


class FlatConfig(Config):
    """The flat engine has no options."""


def build_flat(config: FlatConfig, vectors_ND: np.ndarray, ids_N: np.ndarray) -> Any:
    """An exact index: IndexFlatIP in an IndexIDMap2, so that vectors can be read back by id.

    Args:
        config: No options.
        vectors_ND: (N, D) float32, L2-normalised, C order.
        ids_N: (N,) int64, unique, not negative.
    """
    faiss = load_faiss()
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors_ND.shape[1]))
    index.add_with_ids(vectors_ND, ids_N)
    return index


ENGINES = Registry("index engine", (Spec("flat", FlatConfig, build_flat),), GROUP)


def write_faiss(index: Any, path: Path) -> None:
    """Write a faiss index. Raises: ArtifactError, for example when the disk is full."""
    try:
        load_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be written: {_first_line(error)}") from error


def read_faiss(path: Path, *, dim: int, rows: int) -> Any:
    """Read a faiss index whose bytes were verified, and check that it is what the manifest says.

    Raises:
        ArtifactError: faiss cannot read it, or it differs in dimension, number of vectors or metric.
    """
    faiss = load_faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} cannot be read by faiss {faiss.__version__}: {_first_line(error)}"
        ) from error
    if not isinstance(index, faiss.IndexIDMap2):
        raise ArtifactError(f"{path} holds a {type(index).__name__}, not an IndexIDMap2")
    found = {"dim": index.d, "rows": index.ntotal, "metric": index.metric_type}
    expected = {"dim": dim, "rows": rows, "metric": faiss.METRIC_INNER_PRODUCT}
    if found != expected:
        raise ArtifactError(f"{path} does not fit its manifest: found {found}, expected {expected}")
    return index


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
