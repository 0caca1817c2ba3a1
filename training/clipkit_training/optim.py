"""Optimizers without decay on vectors and scalars, and learning rates over the run's progress.

Decay belongs on matrices alone: biases, norms, embeddings of one dimension and the log-scale keep their
size. The learning rate is a pure function of the step and of progress in [0, 1], so that a run with a time
budget anneals to zero just as one with a step budget does.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clipkit_training.recipe import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters of `model`.

    Groups with an `lr_scale` want so many times the learning rate (`Step.lr_scales`).

    AdamW (Loshchilov & Hutter 2019), SGD with momentum, or LARS (You et al. 2017) as timm has it: the rate of
    each weight is scaled by trust · ‖w‖ / (‖g‖ + decay · ‖w‖), and that of vectors and scalars is not.
    SimCLR's and BYOL's own codes divide by ‖g + decay · w‖ instead. With `trust_clip` the scaled rate is at
    most the rate.
    """
    scales: Mapping[str, float] = getattr(model, "lr_scales", {})
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    plain = [value for name, value in trainable.items() if name not in scales]
    small = config.weight_decay if config.decay_all else 0.0
    groups: list[dict[str, Any]] = [
        {"params": [value for value in plain if value.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [value for value in plain if value.ndim < 2], "weight_decay": small},
        *({"params": [trainable[name]], "weight_decay": 0.0, "lr_scale": x} for name, x in scales.items()),
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    if config.name == "lars":
        from timm.optim.lars import Lars  # loads torchvision and torch's compiler: 1.5 s and 100 MB

        groups[0]["always_adapt"] = True  # also where weight_decay is 0
        options: dict[str, Any] = {"momentum": config.momentum, "trust_coeff": config.trust}
        return Lars(groups, lr=config.lr, trust_clip=config.trust_clip, **options)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(config: OptimConfig, step: int, progress: float, warm: float = 0.0) -> float:
    """The rate at a step: a linear warm-up over `warmup_steps`, then the schedule.

    Args:
        config: Says which schedule.
        step: How many steps were taken.
        progress: The share of the budget that is spent, in [0, 1].
        warm: What it was when the warm-up ended: there the cosine begins. Milestones are shares of the whole.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "steps":
        share = 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    else:
        since = min(1.0, max(0.0, progress - warm) / (1 - warm)) if warm < 1 else 0.0
        share = 0.5 * (1 + math.cos(math.pi * since))
    return config.lr * warmup * share
