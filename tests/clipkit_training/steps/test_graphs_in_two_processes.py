"""The Steps on graphs in two gloo processes with unequal parts train as one process with all of them does."""

from typing import Any

import pytest

from tests.clipkit_training.steps import graph_worker as worker
from tests.clipkit_training.steps.support import assert_one_is_two
from tests.distributed.support import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo ranks saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 2)


@pytest.mark.parametrize("name", worker.CONFIGS)
def test_two_ranks_train_as_one_process_does(name: str, ranks: list[dict[str, Any]]) -> None:
    assert_one_is_two(name, worker.trained(name, None, None), ranks)


def test_both_ranks_refuse_a_batch_in_which_neither_has_an_edge(ranks: list[dict[str, Any]]) -> None:
    assert all("no graph of this batch has an edge" in rank["refusal"] for rank in ranks)
