"""An index of 200 random vectors, built anew for each test that changes it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clipkit.index import build_index


@pytest.fixture
def vectors() -> np.ndarray:
    """(200, 16) float32 of length 1."""
    x = np.random.default_rng(0).standard_normal((200, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def index_path(tmp_path: Path, vectors: np.ndarray, write_embeddings: Callable[..., Path]) -> Path:
    """A built index folder; item i has the vector `vectors[i]` rounded to fp16."""
    return build_index(write_embeddings(tmp_path / "embeddings", vectors, parts=3), tmp_path / "index")
