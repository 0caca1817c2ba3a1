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
