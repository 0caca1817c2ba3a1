"""Fixtures of the Steps' tests: tiny encoders and batches of noise, as functions; see `support`."""

from collections.abc import Callable
from typing import Any

import pytest

from clipkit.models import Encoder
from clipkit_data.batches.maker import Batch
from tests.clipkit_training.steps import step_worker
from tests.clipkit_training.steps.support import random_batch, tiny_encoder
from tests.distributed.support import run


@pytest.fixture
def make_encoder() -> Callable[..., Encoder]:
    """`make_encoder(tower="batch_norm", seed=0)`; the tower is also "group_norm" or "vit"."""
    return tiny_encoder


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """`make_batch(rows=8, views=2, seed=0, step=0, sample_ids=None, index=None, labels=None)`."""
    return random_batch


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo ranks of `step_worker` saved, by Step."""
    return run(step_worker, tmp_path_factory.mktemp("gloo"), 2)
