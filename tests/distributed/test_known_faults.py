"""Faults of other libraries on several processes, by name: each would be noticed, and clipkit has none.

Each test runs one row of `faults_worker.FAULTS` on two and three gloo processes. Whatever has the fault must
differ from one process in the way that the fault predicts; the same lines without the fault, and clipkit,
must not. So a test here cannot pass by looking away.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import faults_worker as worker
from tests.distributed.support import run

Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks of a real gloo group saved."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 3)


class Comparison:
    """A fault on `size` processes: gradients of one process, and the ranks' mean of every version."""

    def __init__(self, saved: list[dict[str, Any]], fault: str, size: int) -> None:
        self.size, ours = size, worker.FAULTS[fault][1]
        count = size if fault in worker.LOCAL else 1
        parts = [worker.rows_of(part, count) for part in range(count)]
        self.right = _mean([worker.gradients(lambda p, rows=rows: ours(p, rows, {})) for rows in parts])
        ranks = [rank[str(size)][fault] for rank in saved[:size]]
        self.found = {what: _mean([rank[what] for rank in ranks]) for what in ranks[0]}
        self.faulty = self.found.pop("faulty")

    def check(self) -> None:
        """The repaired lines and clipkit have the gradients of one process, the faulty lines have not."""
        for what, gradients in self.found.items():
            for name, value in self.right.items():
                _same(gradients[name], value, f"{what}, {self.size} processes, {name}")
        assert any(_far(self.faulty[name], self.right[name]) for name in ("x", "y", "hard", "scale"))


Compare = Callable[[str], Comparison]


def _mean(ranks: list[Gradients]) -> Gradients:
    return {name: torch.stack([r[name] for r in ranks]).mean(0) for name in ranks[0]}


def _same(got: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")


def _far(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).norm()) > 0.1 * float(expected.norm())


@pytest.fixture(params=worker.SIZES)
def compare(request: pytest.FixtureRequest, saved: list[dict[str, Any]]) -> Compare:
    """A function that gives the checked comparison of a fault, on two and on three processes."""

    def compared(fault: str) -> Comparison:
        comparison = Comparison(saved, fault, request.param)
        comparison.check()
        return comparison

    return compared


def test_gather_whose_backward_is_not_summed_over_the_ranks(compare: Compare) -> None:
    """lightly's `GatherLayer` until 2024-04 kept the gradient of one copy of the rows (lightly #1528, #1531).

    The loss was right and two devices still did not train as one: as a candidate of other ranks' rows, a row
    got no gradient.
    """
    found = compare("gather without sum")
    _same(found.faulty["loss"], found.right["loss"])
    _same(found.faulty["scale"], found.right["scale"])


def test_labels_moved_by_the_rank_although_nothing_was_gathered(compare: Compare) -> None:
    """lightly's `NTXentLoss` added rank · batch size to the labels without a gather too (#1176, #1177).

    Rank 0 was right; the others pulled other images together or asked for columns that do not exist.
    """
    found = compare("labels moved without gather")
    assert _far(found.faulty["loss"], found.right["loss"])


def test_statistics_of_all_ranks_reduced_without_a_backward(compare: Compare) -> None:
    """lightly's `BarlowTwinsLoss` (#1977) and `SIGReg` (#1920) summed over the ranks with a plain all-reduce.

    The loss was right, every gradient 1/W of the true one. clipkit has neither loss; the same happens to the
    log-sum-exp over columns of which each rank holds some rows.
    """
    found = compare("statistics without backward")
    _same(found.faulty["loss"], found.right["loss"])
    for name in ("x", "y", "scale"):
        _same(found.faulty[name] * found.size, found.right[name])


def test_views_joined_before_the_gather_so_that_masks_hit_other_rows(compare: Compare) -> None:
    """Spijkervet/SimCLR gathered [x_r; y_r] and took row i + N for the other view of row i (#37, #46).

    With one process it is; with several, images are pulled towards others and the loss falls all the same.
    """
    found = compare("views joined before gather")
    assert _far(found.faulty["loss"], found.right["loss"])


def test_the_whole_loss_on_every_rank_with_gradients_of_its_own_rows(compare: Compare) -> None:
    """SimCSE on several devices: gathered without a gradient, own rows put back, then averaged by DDP.

    Features get 1/W of the gradient. Adam hides that; clipping by norm, SGD and LARS do not.
    """
    found = compare("whole loss with local gradients")
    _same(found.faulty["loss"], found.right["loss"])
    for name in ("x", "y"):
        _same(found.faulty[name] * found.size, found.right[name])


def test_the_whole_clip_loss_with_features_at_1_over_w_and_the_scale_in_full(compare: Compare) -> None:
    """open_clip's default, `local_loss` and `gather_with_grad` off: the same, in both directions.

    The gradient of the logit scale is not divided, and so W times as large beside theirs.
    """
    found = compare("whole loss in both directions")
    _same(found.faulty["scale"], found.right["scale"])
    for name in ("x", "y"):
        _same(found.faulty[name] * found.size, found.right[name])


def test_labels_that_point_at_hard_negatives_after_the_gather(compare: Compare) -> None:
    """sentence-transformers' `gather_across_devices` with hard negatives, before it was released (PR #3453).

    Candidates came as P N P N, the labels meant P P N N: anchors were pulled towards hard negatives.
    """
    found = compare("positives and negatives joined before gather")
    assert _far(found.faulty["loss"], found.right["loss"])


def test_column_terms_missing_from_a_local_loss_without_gradient_gather(compare: Compare) -> None:
    """open_clip's `local_loss` without `gather_with_grad`, and SLIP's CLIP loss.

    What is left is the gradient with all candidates taken for constants, in each direction.
    """
    found = compare("local rows in both directions")

    def constant_candidates(p: Gradients) -> Tensor:
        everything = slice(worker.N)
        rows = worker.our_rows({**p, "y": p["y"].detach()}, everything, {})
        return (rows + worker.our_columns({**p, "x": p["x"].detach()}, everything, {})) / 2

    for name, value in worker.gradients(constant_candidates).items():
        _same(found.faulty[name], value, name)


def test_the_gradient_of_the_scale_summed_over_ranks_before_ddp_averages(compare: Compare) -> None:
    """Inf-CL's `GradientGather` sums the gradient of the logit scale: W times too large, features right."""
    found = compare("scale summed before the mean")
    _same(found.faulty["scale"], found.right["scale"] * found.size)
    for name in ("x", "y", "loss"):
        _same(found.faulty[name], found.right[name])
