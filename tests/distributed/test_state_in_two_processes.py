"""Two gloo processes with unequal batches hold the queue, bank and twin of one process, bit for bit alike."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import state_worker as worker
from tests.distributed.support import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks of a real gloo group saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 2)


def _same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", worker.DTYPES)
def test_every_ranks_queue_is_that_of_one_process_bit_for_bit(
    ranks: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    # pytorch-metric-learning's CrossBatchMemory orders the rows of the ranks differently on every rank,
    # stable-pretraining keeps one queue for each rank.
    for rank in ranks:
        _same(rank["queue"][str(dtype)], worker.queue_states(None, None, dtype))


@pytest.mark.parametrize("dtype", worker.DTYPES)
def test_every_ranks_bank_is_that_of_one_process_bit_for_bit(
    ranks: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    for rank in ranks:
        _same(rank["bank"][str(dtype)], worker.bank_states(None, None, dtype))


def test_a_run_of_moco_is_the_same_on_both_ranks_and_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    _same(ranks[0]["moco"], ranks[1]["moco"])
    alone = worker.moco(None, None, interrupted=False)
    assert set(ranks[0]["moco"]) == set(alone)
    for name, value in alone.items():
        torch.testing.assert_close(ranks[0]["moco"][name], value, rtol=1e-12, atol=1e-12)
    assert int(alone["twin.step"]) == 5
    assert int(alone["queue.count"]) == 10


def test_an_interrupted_run_of_moco_ends_bit_for_bit_where_the_other_does(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        _same(rank["resumed"], rank["moco"])
    _same(worker.moco(None, None, interrupted=True), worker.moco(None, None, interrupted=False))


def test_every_rank_refuses_when_the_ranks_do_not_fit_together(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        told = rank["refusals"]
        assert "hold different queues (size, dim, number of the dtype, cursor, count)" in told["ahead"]
        assert "[(7, 4, 1, 2, 2), (7, 4, 1, 0, 0)] (make them alike and load the same state" in told["ahead"]
        assert "[(7, 4, 1, 0, 0), (8, 4, 1, 0, 0)]" in told["sizes"]
        assert "index 9 (at place 2) is outside of the bank, whose rows are 0 to 8" in told["index"]
        assert "hold different banks or features" in told["dtype"]


def test_a_process_outside_of_the_group_is_refused(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["refusals"]["outside"] == ""
    assert "not a member of the process group" in ranks[1]["refusals"]["outside"]
