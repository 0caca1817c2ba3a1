"""Which weights decay, and the learning rate over a run."""

import math

import pytest
import torch
from torch import nn

from clipkit_training.optim import build_optimizer, learning_rate
from clipkit_training.recipe import OptimConfig


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.register_parameter("log_scale", nn.Parameter(torch.tensor(1.0)))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    model.append(frozen)
    decayed, others = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert others["weight_decay"] == 0
    assert sorted(p.ndim for p in others["params"]) == [0, 1, 1, 1]


def test_warm_up_then_cosine_to_zero() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 0.0) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert learning_rate(config, 100, 0.5) == pytest.approx(1.0)
    assert learning_rate(config, 100, 0.25) == pytest.approx(1 + math.sqrt(0.5))
    assert learning_rate(config, 100, 1.0) == learning_rate(config, 100, 1.3) == pytest.approx(0)
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0), 0, 0.0) == 2.0


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (10, 10), (20, 10)])
def test_the_cosine_begins_where_the_warm_up_ends(warmup: int, total: int) -> None:
    config, warm = OptimConfig(lr=1.0, warmup_steps=warmup), min(1.0, warmup / total)
    for step in range(total):
        progress = step / total
        if step < warmup:
            wanted = (step + 1) / warmup
        else:
            wanted = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert learning_rate(config, step, progress, min(warm, progress)) == pytest.approx(wanted)


def test_all_decay_where_a_recipe_says_so() -> None:
    groups = build_optimizer(nn.Linear(3, 4), OptimConfig(weight_decay=0.3, decay_all=True)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("lr", [0.001, 0.01, 1.0])
def test_lars_moves_each_weight_as_its_rule_says(lr: float, clip: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    config = OptimConfig(
        name="lars", lr=lr, momentum=0.0, weight_decay=0.1, trust=0.02, trust_clip=clip, warmup_steps=0
    )
    optimizer = build_optimizer(model, config)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(torch.randn(4, 5, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    grad = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    weight, slope = before["weight"], grad["weight"]
    trust = 0.02 * float(weight.norm() / (slope.norm() + 0.1 * weight.norm()))
    if clip:
        trust = min(trust / lr, 1.0)
    torch.testing.assert_close(
        model.weight.detach(), weight - lr * trust * (slope + 0.1 * weight), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(model.bias.detach(), before["bias"] - lr * grad["bias"])
