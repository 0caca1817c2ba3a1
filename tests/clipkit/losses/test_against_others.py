"""Equality with the same losses in open_clip, lightly, pytorch-metric-learning and torch."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit import losses

with warnings.catch_warnings():  # what these libraries warn about at import is theirs
    warnings.simplefilter("ignore")
    from lightly.loss import NTXentLoss as LightlyNTXent
    from open_clip.loss import ClipLoss, SigLipLoss
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

N, D = 12, 7


@pytest.fixture
def xy() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)


def same_value_and_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    mine, other = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_open_clip_clip_loss(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    scale = torch.tensor(14.3, requires_grad=True)
    theirs = ClipLoss()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale)
    same_value_and_gradients(losses.clip_loss(x, y, scale=scale), theirs, [x, y, scale])


def test_open_clip_siglip_loss(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    theirs = SigLipLoss()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, bias)
    ours = losses.siglip_loss(x, y, scale=scale, bias=bias)
    same_value_and_gradients(ours, theirs, [x, y, scale, bias])


def test_lightly_nt_xent(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    theirs = LightlyNTXent(temperature=0.2)(x, y)
    same_value_and_gradients(losses.nt_xent_loss(x, y, temperature=0.2), theirs, [x, y])


def test_metric_learning_nt_xent(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    labels = torch.arange(N).repeat(2)
    theirs = NTXentLoss(temperature=0.2)(torch.cat([x, y]), labels)
    same_value_and_gradients(losses.nt_xent_loss(x, y, temperature=0.2), theirs, [x, y])


def test_metric_learning_nt_xent_with_several_positives(xy: tuple[Tensor, Tensor]) -> None:
    """Its denominator holds one positive at a time and its mean runs over pairs: denominator="one"."""
    x, _ = xy
    labels = torch.arange(N) // 3
    theirs = NTXentLoss(temperature=0.2)(x, labels)
    rows = torch.arange(N)
    ours = losses.contrast(
        x, x, q_id=labels, k_id=labels, q_view=rows, k_view=rows, scale=5.0, denominator="one"
    ).loss
    same_value_and_gradients(ours, theirs, [x])


def test_metric_learning_sup_con(xy: tuple[Tensor, Tensor]) -> None:
    x, _ = xy
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 3, 3, 0, 4])  # label 4 once: its row is skipped
    theirs = SupConLoss(temperature=0.2)(x, labels)
    same_value_and_gradients(losses.sup_con_loss(x, labels, temperature=0.2), theirs, [x])


def test_torch_triplet_margin_loss(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    n = torch.randn(N, D, requires_grad=True)
    theirs = F.triplet_margin_loss(x, y, n, margin=0.7, eps=0.0)
    same_value_and_gradients(losses.triplet_loss(x, y, n, margin=0.7), theirs, [x, y, n])


def test_torch_binary_cross_entropy_for_nce(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    noise = torch.randn(N, 4, D)
    log_z = torch.tensor(2.0, requires_grad=True)
    keys = F.normalize(torch.cat([y[:, None], noise], 1), dim=-1)
    logits = torch.einsum("nd,nkd->nk", F.normalize(x, dim=-1), keys) / 0.1 - log_z
    logits = logits - torch.log(torch.tensor(4 / 100))
    target = torch.zeros_like(logits)
    target[:, 0] = 1
    theirs = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / N
    ours = losses.nce_loss(x, y, noise, temperature=0.1, log_z=log_z, num_noise_population=100)
    same_value_and_gradients(ours, theirs, [x, y, log_z])


def test_torch_cross_entropy_for_moco(xy: tuple[Tensor, Tensor]) -> None:
    x, y = xy
    queue = F.normalize(torch.randn(30, D), dim=-1)
    q, k = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.07
    theirs = F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))
    ours = losses.info_nce_loss(x, y, negatives=queue, temperature=0.07)
    same_value_and_gradients(ours, theirs, [x, y])
