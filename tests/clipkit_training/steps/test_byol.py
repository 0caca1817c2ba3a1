"""BYOL: predictions against a twin that starts as a copy, has its own statistics and follows ever slower."""

import copy
import math
from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from torch import Tensor, nn

from clipkit_training.steps.byol import BYOLConfig, BYOLStep, build_byol
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
    train,
)

STEPS = 10


def make(tower: str = "group_norm", **options: Any) -> BYOLStep:
    torch.manual_seed(0)
    config = BYOLConfig(**{"hidden": 16, "dim": 8, **options})
    return build_byol(tiny_encoder(tower), config, setting(total_steps=STEPS))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().double() for name, parameter in module.named_parameters()}


def online(step: BYOLStep) -> nn.Sequential:
    return nn.Sequential(step.model, step.projector)


@pytest.mark.parametrize("predictor", [True, False])
def test_a_step_is_that_of_the_paper(predictor: bool) -> None:
    step, batch = make(predictor=predictor), random_batch(6)
    reference = Reference(step, "projector", "predictor")
    z = [reference.parts["projector"](reference.features(view)) for view in batch.views]
    targets = [projection.detach() for projection in z]  # the twin is still the network
    p = [reference.parts["predictor"](projection) for projection in z]
    expected = (2 - 2 * cosines(p[0], targets[1]).diag() + 2 - 2 * cosines(p[1], targets[0]).diag()).mean()
    expected.backward()
    loss, _ = step(batch)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_near(gradients(step), reference.gradients(), 1e-4)


def test_the_loss_is_lightlys_up_to_its_constant() -> None:
    step, batch = make(), random_batch(6)
    z = [online(step)(view) for view in batch.views]
    with torch.no_grad():
        targets = [copy.deepcopy(step.target)(view) for view in batch.views]
    criterion = NegativeCosineSimilarity()
    total = criterion(step.predictor(z[0]), targets[1]) + criterion(step.predictor(z[1]), targets[0])
    torch.testing.assert_close(step(batch)[0], 4 + 2 * total)


def test_two_processes_train_as_one(two_ranks: list[dict[str, Any]]) -> None:
    assert_one_is_two("byol", trained("byol", None, None), two_ranks)


def test_fault_7_the_twin_starts_as_a_copy_of_backbone_and_projector() -> None:
    step = make("batch_norm")
    source = online(step).state_dict()
    assert step.target.module.state_dict().keys() == source.keys()
    for name, value in step.target.module.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_the_twin_follows_after_each_step_by_the_decay_of_that_step() -> None:
    step = make(momentum=0.9)
    start = expected = weights(online(step))
    for number in range(3):
        decay = 1 - (1 - 0.9) * (math.cos(math.pi * number / STEPS) + 1) / 2
        train(step, [random_batch(6, seed=number)])
        source = weights(online(step))
        expected = {name: decay * value + (1 - decay) * source[name] for name, value in expected.items()}
    assert_near(weights(step.target.module), expected, 1e-6)
    assert not any(torch.equal(expected[name], value) for name, value in start.items())


def test_fault_22_the_twin_has_batch_norm_statistics_of_its_own_batches() -> None:
    step, batch = make("batch_norm", momentum=0.5), random_batch(6)
    train(step, [random_batch(6, seed=1)], rate=0.5)  # from here on the weights differ
    twin = copy.deepcopy(step.target.module).train()
    for view in batch.views:
        twin(view)
    train(step, [batch])
    buffers = dict(step.target.module.named_buffers())
    for name, value in twin.named_buffers():
        torch.testing.assert_close(buffers[name], value, msg=lambda m, name=name: f"{name}: {m}")
    source = dict(online(step).named_buffers())
    differing = [
        name for name in buffers if "running_var" in name and not torch.equal(buffers[name], source[name])
    ]
    assert differing


@pytest.mark.parametrize("done", [1, 4])
def test_fault_21_the_first_decay_after_a_resume_is_that_of_its_step(done: int) -> None:
    step, resumed = make(momentum=0.5), make(momentum=0.5)
    train(step, [random_batch(6, seed=seed) for seed in range(done)])
    resumed.load_state_dict(step.state_dict())
    before = weights(resumed.target.module)
    train(resumed, [random_batch(6, seed=done)])
    decay = 1 - 0.5 * (math.cos(math.pi * done / STEPS) + 1) / 2
    source = weights(online(resumed))
    expected = {name: decay * value + (1 - decay) * source[name] for name, value in before.items()}
    assert_near(weights(resumed.target.module), expected, 1e-6)


def test_fault_23_the_decay_rises_and_nothing_is_added_to_the_paper() -> None:
    step = make()
    decay = step.target.decay
    assert callable(decay)
    assert (decay(0), decay(STEPS)) == (0.996, 1.0)
    kinds = [type(layer) for head in (step.projector, step.predictor) for layer in head.children()]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear] * 2  # no simplicial embeddings


def test_without_a_predictor_the_embeddings_collapse_and_the_figure_tells() -> None:
    spread = {}
    for predictor in (True, False):
        step = make(predictor=predictor, momentum=0.9)
        figures = train(step, [random_batch(16, seed=seed) for seed in range(18)], rate=0.5)
        spread[predictor] = float(figures[-1]["embedding_std"])
    assert spread[False] < 0.3 * spread[True]
