"""Two and three gloo processes with unequal local batches have the loss and gradients of one process."""

import importlib.util
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("losses_worker.py")


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clipkit_losses_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load()
EVERYTHING = worker.rows_of(0, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks of a real gloo group saved."""
    folder, root = tmp_path_factory.mktemp("gloo"), WORKER.parents[2]
    path = os.pathsep.join(x for x in (str(root), os.environ.get("PYTHONPATH", "")) if x)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        processes = []
        for rank in range(3):
            log = stack.enter_context((folder / f"{rank}.log").open("w"))
            command = [sys.executable, str(WORKER), str(rank), str(folder / "store"), str(folder)]
            process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        codes = [process.wait(timeout=180) for process in processes]
    logs = "".join((folder / f"{rank}.log").read_text() for rank in range(3))
    assert codes == [0, 0, 0], logs
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of the members of the group of two, then of three."""
    return [saved[rank][str(request.param)] for rank in range(request.param)]


def _mean(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([r[name] for r in ranks]).mean(0) for name in ranks[0]}


def _same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", worker.CASES)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        expected = worker.gradients(worker.CASES[name], EVERYTHING, None, dtype)
        _same(_mean([r[str(dtype)][name] for r in ranks]), expected, tolerance)


def test_bfloat16_features_travel_exactly_and_their_gradients_are_summed_wide(
    ranks: list[dict[str, Any]],
) -> None:
    expected = worker.gradients(worker.CASES["clip_loss"], EVERYTHING, None, torch.bfloat16)
    got = _mean([r["narrow"] for r in ranks])
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-6, atol=1e-6)
    _same(got, expected, 2 * torch.finfo(torch.bfloat16).eps)


def test_ddp_gives_the_gradients_of_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = worker.towers_step(EVERYTHING, None)
    for rank in ranks:
        _same({**rank["towers"], "loss": expected["loss"]}, expected, 1e-6)
    _same(_mean([r["towers"] for r in ranks]), expected, 1e-6)


def test_statistics_are_those_of_the_whole_group(ranks: list[dict[str, Any]]) -> None:
    expected = worker.statistics(EVERYTHING, None)
    for rank in ranks:
        _same(rank["statistics"], expected, 1e-12)


def test_a_rank_may_have_no_rows(ranks: list[dict[str, Any]]) -> None:
    expected = worker.gradients(worker.CASES["clip_loss"], EVERYTHING, None, torch.float64)
    _same(_mean([r["empty"] for r in ranks]), expected, 1e-12)


def test_every_rank_refuses_when_the_ranks_disagree(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "the ranks of the group disagree about q and k" in rank["frozen"]
        assert "the ranks of the group disagree about q and k" in rank["width"]


def test_a_process_outside_of_the_group_is_refused(saved: list[dict[str, Any]]) -> None:
    assert "not a member of the process group" in saved[2]["2"]
