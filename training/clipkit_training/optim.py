"""AdamW without decay on vectors and scalars, and a cosine over the run's progress.

Decay belongs on matrices alone: biases, norms, embeddings of one dimension and the log-scale keep their
size. The learning rate is a pure function of the step and of progress in [0, 1], so that a run with a time
budget anneals to zero just as one with a step budget does.
"""

import math

import torch
from torch import nn

from clipkit_training.recipe import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over the trainable parameters of `model`."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Linear warm-up over `warmup_steps`, under a cosine from lr at progress 0 to 0 at progress 1."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
