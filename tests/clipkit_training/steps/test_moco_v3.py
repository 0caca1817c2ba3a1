"""MoCo v3: cross-entropy among the keys of all processes, times 2τ, and a twin that starts as a copy."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.errors import ConfigError
from clipkit_training.steps.moco_v3 import MocoV3Config, MocoV3Step, build_moco_v3
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


def make(tower: str = "group_norm", **options: Any) -> MocoV3Step:
    torch.manual_seed(0)
    config = MocoV3Config(**{"hidden": 16, "dim": 8, **options})
    return build_moco_v3(tiny_encoder(tower), config, setting(total_steps=STEPS))


def weights(step: MocoV3Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Those of the network and of the twin, under the same names."""
    both = (nn.Sequential(step.model, step.projector), step.twin.module)
    network, twin = ({name: p.detach().clone().double() for name, p in m.named_parameters()} for m in both)
    return network, twin


@pytest.mark.parametrize(("layers", "predictor_norm"), [(2, False), (3, True)])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_step_is_that_of_the_paper(layers: int, predictor_norm: bool, temperature: float) -> None:
    step = make(layers=layers, predictor_norm=predictor_norm, temperature=temperature)
    batch = random_batch(6)
    reference = Reference(step, "projector", "predictor")
    z = [reference.parts["projector"](reference.features(view)) for view in batch.views]
    keys = [projection.detach() for projection in z]  # the twin is still the network
    q = [reference.parts["predictor"](projection) for projection in z]
    own = torch.arange(6)
    losses = [F.cross_entropy(cosines(q[i], keys[1 - i]) / temperature, own) for i in (0, 1)]
    expected = 2 * temperature * (losses[0] + losses[1])
    expected.backward()
    loss, _ = step(batch)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert_near(gradients(step), reference.gradients(), 1e-4)


def test_faults_1_and_2_two_processes_train_as_one(two_ranks: list[dict[str, Any]]) -> None:
    assert_one_is_two("moco_v3", trained("moco_v3", None, None), two_ranks)


def test_fault_7_the_twin_starts_as_a_copy_and_follows_after_each_step() -> None:
    step = make(momentum=0.9)
    source, twin = weights(step)
    assert_near(twin, source, 0.0)
    for number in range(3):
        decay = 1 - (1 - 0.9) * (math.cos(math.pi * number / STEPS) + 1) / 2
        train(step, [random_batch(6, seed=number)])
        source, _ = weights(step)
        twin = {name: decay * value + (1 - decay) * source[name] for name, value in twin.items()}
    assert_near(weights(step)[1], twin, 1e-6)


def test_fault_22_the_twins_batch_norm_statistics_are_not_the_networks() -> None:
    step = make("batch_norm", momentum=0.5)
    train(step, [random_batch(6, seed=seed) for seed in range(2)], rate=0.5)
    network = dict(nn.Sequential(step.model, step.projector).named_buffers())
    twin = dict(step.twin.module.named_buffers())
    assert int(twin["1.1.num_batches_tracked"]) == 4  # two views in each of two steps
    assert not torch.equal(twin["1.1.running_var"], network["1.1.running_var"])


def test_a_frozen_patch_embedding_stays_as_it_was_drawn() -> None:
    step = make("vit", freeze_patches=True)
    patches = step.model.tower.get_submodule("trunk.patch_embed")
    before = [parameter.clone() for parameter in patches.parameters()]
    train(step, [random_batch(4, side=32)])
    assert before
    for parameter, drawn in zip(patches.parameters(), before, strict=True):
        assert torch.equal(parameter, drawn)
        assert not parameter.requires_grad
    others = [p for name, p in step.model.named_parameters() if "patch_embed" not in name]
    assert all(parameter.grad is not None for parameter in others)


def test_a_tower_without_a_patch_embedding_cannot_freeze_it() -> None:
    with pytest.raises(ConfigError, match="freeze_patches needs a ViT of timm"):
        make(freeze_patches=True)
