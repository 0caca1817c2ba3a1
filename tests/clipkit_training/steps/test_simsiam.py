"""SimSiam: each view predicts the other's projection, which gets no gradient."""

from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity

from clipkit_training.steps.simsiam import SimSiamConfig, SimSiamStep, build_simsiam
from tests.clipkit_training.steps.step_worker import trained
from tests.clipkit_training.steps.support import (
    Reference,
    assert_near,
    assert_one_is_two,
    cosines,
    gradients,
    random_batch,
    setting,
    tiny_encoder,
)


def make(**options: Any) -> SimSiamStep:
    torch.manual_seed(0)
    return build_simsiam(tiny_encoder("group_norm"), SimSiamConfig(**{"dim": 8, **options}), setting())


@pytest.mark.parametrize("layers", [2, 3])
def test_a_step_is_that_of_the_paper(layers: int) -> None:
    step, batch = make(layers=layers), random_batch(6)
    reference = Reference(step, "projector", "predictor")
    z = [reference.parts["projector"](reference.features(view)) for view in batch.views]
    p = [reference.parts["predictor"](projection) for projection in z]
    halves = [cosines(p[0], z[1].detach()).diag().mean(), cosines(p[1], z[0].detach()).diag().mean()]
    expected = -halves[0] / 2 - halves[1] / 2
    expected.backward()
    loss, metrics = step(batch)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics["positive_similarity"], -metrics["loss"])
    assert_near(gradients(step), reference.gradients(), 1e-4)


def test_the_loss_is_lightlys() -> None:
    step, batch = make(), random_batch(6)
    z = [step.projector(step.model.encode(view)) for view in batch.views]
    p = [step.predictor(projection) for projection in z]
    criterion = NegativeCosineSimilarity()
    expected = (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach())) / 2
    torch.testing.assert_close(step(batch)[0], expected)


def test_two_processes_train_as_one(two_ranks: list[dict[str, Any]]) -> None:
    assert_one_is_two("simsiam", trained("simsiam", None, None), two_ranks)


def test_there_is_no_twin_in_the_state() -> None:
    step = make()
    assert {name.split(".")[0] for name in step.state_dict()} == {"model", "projector", "predictor"}
    assert all(parameter.requires_grad for parameter in step.parameters())
