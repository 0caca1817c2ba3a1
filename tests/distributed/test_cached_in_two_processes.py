"""Two gloo processes with unequal shares of a batch step as one with all of it, after one all-reduce."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import cached_worker as worker
from tests.distributed.support import run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks of a real gloo group saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 2)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process makes of the whole batch, with 1 in the gradient of the scale before."""
    return worker.step(slice(0, worker.N), None)


def _assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Equal to 1e-6 of the largest gradient."""
    largest = max(float(e.abs().max()) for e in expected.values() if e is not None)
    assert largest > 0
    for name, e in expected.items():
        g = got[name]
        assert (g is None) == (e is None), name
        if g is not None and e is not None:
            torch.testing.assert_close(g, e, rtol=0, atol=1e-6 * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", ["step", "no rows"])
def test_gradients_are_those_of_one_process_and_earlier_ones_stay(
    case: str, saved: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for rank, results in enumerate(saved):
        expected = dict(alone["gradients"])
        expected["log_scale"] = expected["log_scale"] + rank  # the earlier gradient was 1 + rank
        _assert_same(results[case]["gradients"], expected)
    mean = torch.stack([results[case]["loss"] for results in saved]).mean()
    torch.testing.assert_close(mean, alone["loss"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["ddp", "ddp that looks for unused parameters"])
def test_ddp_modules_are_averaged_once(case: str, saved: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    expected = dict(alone["gradients"])
    expected["log_scale"] = expected["log_scale"] - 1  # there was none before
    for results in saved:
        _assert_same(results[case]["gradients"], expected)
        _assert_same(results[case]["around"], expected)
        assert results["collectives"] > 0
        assert results[case]["collectives"] == results["collectives"] + 1


def test_gradients_of_one_rank_are_averaged_with_zero_and_none_stays_none(
    saved: list[dict[str, Any]],
) -> None:
    alone = worker.uneven(0, None)["gradients"]
    half = {n: g / 2 if g is not None and n.startswith("text") else g for n, g in alone.items()}
    assert half["unused"] is None
    assert half["text.0.weight"] is None
    assert half["text.1.weight"] is not None
    for results in saved:
        _assert_same(results["uneven"]["gradients"], half)


def test_what_would_not_be_averaged_is_refused_on_every_rank(saved: list[dict[str, Any]]) -> None:
    for results in saved:
        refused = results["refused"]
        assert "a parameter () torch.float32 is in none of the modules" in refused["parameter of the loss"]
        assert "is in none of the modules" in refused["parameter of an encoder"]
        assert "DistributedDataParallel: give group" in refused["ddp alone"]
        assert refused["nothing"] == ""


def test_a_process_outside_of_the_group_is_refused(saved: list[dict[str, Any]]) -> None:
    assert saved[0]["outside"] == ""
    assert "not a member of the process group" in saved[1]["outside"]
