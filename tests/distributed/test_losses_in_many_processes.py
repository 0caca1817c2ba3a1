"""One to four gloo processes with unequal local batches have the loss and gradients of one process."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import losses_worker as worker
from tests.distributed.support import run

EVERYTHING = worker.rows_of(0, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks of a real gloo group saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 4)


GROUPS = {f"{exchange} {size}": size for exchange in worker.EXCHANGES for size in worker.SIZES}


@pytest.fixture(params=GROUPS)
def ranks(request: pytest.FixtureRequest, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of the members of a group, for each way to exchange rows and each size."""
    return [saved[member][request.param] for member in worker.MEMBERS[GROUPS[request.param]]]


def _mean(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name] for r in ranks]).mean(0) for name in ranks[0]}


def _same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@functools.cache
def _one_process(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return worker.gradients(worker.CASES[name], EVERYTHING, {}, dtype)


@pytest.mark.parametrize("name", worker.CASES)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        found = [rank[str(dtype)][name] for rank in ranks]
        assert all(isinstance(x, dict) for x in found), f"refused: {found}"
        _same(_mean(found), _one_process(name, dtype), tolerance)


@pytest.mark.parametrize("name", worker.CASES)
def test_every_case_has_a_loss_and_a_gradient(name: str) -> None:
    """Zeros would be equal in any number of processes."""
    found = _one_process(name, torch.float64)
    assert all(found[x].abs().max() > 1e-3 for x in ("loss", "x")), found


def test_bfloat16_features_travel_exactly_and_their_gradients_are_summed_wide(
    ranks: list[dict[str, Any]],
) -> None:
    expected = _one_process("clip_loss", torch.bfloat16)
    got = _mean([r["narrow"] for r in ranks])
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    _same(got, expected, 2 * torch.finfo(torch.bfloat16).eps)


def test_ddp_gives_the_gradients_of_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = worker.towers_step(EVERYTHING, {})
    for rank in ranks:
        _same({**rank["towers"], "loss": expected["loss"]}, expected, 1e-12)
    _same(_mean([r["towers"] for r in ranks]), expected, 1e-12)


def test_statistics_are_those_of_the_whole_group(ranks: list[dict[str, Any]]) -> None:
    expected = worker.statistics(EVERYTHING, {})
    for rank in ranks:
        _same(rank["statistics"], expected, 1e-12)


def test_a_rank_may_have_no_rows(ranks: list[dict[str, Any]]) -> None:
    _same(_mean([r["empty"] for r in ranks]), _one_process("clip_loss", torch.float64), 1e-12)


def test_every_rank_refuses_when_the_ranks_disagree(ranks: list[dict[str, Any]]) -> None:
    if len(ranks) == 1:  # nobody to disagree with
        assert all(isinstance(ranks[0][what], Tensor) for what in ("frozen", "width", "ways"))
        return
    for rank in ranks:
        assert "the ranks of the group disagree about q and k" in rank["frozen"]
        assert "the ranks of the group disagree about q and k" in rank["width"]
        assert "exchange is ring" in rank["ways"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_process_outside_of_the_group_is_refused(saved: list[dict[str, Any]], group: str) -> None:
    for rank in set(range(4)) - set(worker.MEMBERS[GROUPS[group]]):
        assert "not a member of the process group" in saved[rank][group]
