"""The public losses at the edges: collapse, one row, extreme scales, zero vectors, no positives."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkit import losses

N, D = 6, 5


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    x, y = (torch.randn(N, D).to(dtype).requires_grad_() for _ in range(2))
    return x, y


def test_the_target_of_alignment_gets_no_gradient() -> None:
    prediction, target = _inputs(torch.float32)
    losses.alignment_loss(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad is not None


def test_a_learnable_temperature_gets_its_gradient() -> None:
    x, y = _inputs(torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    losses.info_nce_loss(x, y, temperature=tau).backward()
    h = 1e-6
    above, below = (losses.info_nce_loss(x, y, temperature=0.3 + d) for d in (h, -h))
    assert tau.grad is not None
    assert float(tau.grad) == pytest.approx((above - below).item() / (2 * h), rel=1e-6)


@pytest.mark.parametrize("n", [2, 9, 33])
def test_collapsed_embeddings_give_the_logarithm_of_the_number_of_candidates(n: int) -> None:
    x = torch.ones(n, 8)
    close: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}  # float32 scores of 100 are 8e-6 apart
    assert float(losses.clip_loss(x, x, scale=100.0)) == pytest.approx(math.log(n), **close)
    assert float(losses.nt_xent_loss(x, x, temperature=0.1)) == pytest.approx(math.log(2 * n - 1), **close)
    assert float(losses.info_nce_loss(x, x, temperature=0.1)) == pytest.approx(math.log(n), **close)
    queue = torch.ones(5, 8)
    with_queue = losses.info_nce_loss(x, x, negatives=queue, temperature=0.1)
    assert float(with_queue) == pytest.approx(math.log(6), **close)
    if n > 2:
        labels = torch.arange(n) // 3
        assert float(losses.sup_con_loss(x, labels, temperature=0.1)) == pytest.approx(
            math.log(n - 1), **close
        )


def test_a_batch_of_one() -> None:
    x, y = torch.randn(1, D, requires_grad=True), torch.randn(1, D)
    for loss in (
        losses.clip_loss(x, y, scale=10.0),
        losses.nt_xent_loss(x, y, temperature=0.1),
        losses.info_nce_loss(x, y, temperature=0.1),
        losses.sup_con_loss(x, torch.zeros(1, dtype=torch.int64), temperature=0.1),
    ):
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert losses.siglip_loss(x, y, scale=1.0, bias=0.0).item() > 0


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_scales_stay_finite(scale: float) -> None:
    x, y = _inputs(torch.float32)
    results = [
        losses.clip_loss(x, y, scale=scale),
        losses.siglip_loss(x, y, scale=scale, bias=-10.0),
        losses.nt_xent_loss(x, y, temperature=1 / scale),
        losses.nce_loss(x, y, y[:, None].detach(), temperature=1 / scale, log_z=3.0, num_noise_population=10),
        losses.logistic_loss(x * math.sqrt(scale), y * math.sqrt(scale), y.detach()),
    ]
    for loss in results:
        assert torch.isfinite(loss)
        for g in torch.autograd.grad(loss, [x, y], retain_graph=True):
            assert torch.isfinite(g).all()
    wide = losses.clip_loss(x.double(), y.double(), scale=scale)
    assert results[0].item() == pytest.approx(wide.item(), rel=1e-6, abs=1e-6)


def test_a_small_loss_keeps_its_relative_precision() -> None:
    x = torch.eye(4)
    wide = losses.clip_loss(x.double(), x.double(), scale=60.0)
    assert float(losses.clip_loss(x, x, scale=60.0)) == pytest.approx(float(wide), rel=1e-5)
    assert 0 < float(wide) < 1e-25


def test_zero_vectors_have_cosine_zero_and_no_gradient() -> None:
    x, y = _inputs(torch.float32)
    with torch.no_grad():
        x[2] = 0
        y[4] = 0
    loss = losses.clip_loss(x, y, scale=10.0)
    gx, gy = torch.autograd.grad(loss, [x, y])
    assert torch.isfinite(loss)
    assert torch.isfinite(gx).all()
    assert torch.isfinite(gy).all()
    assert torch.equal(gx[2], torch.zeros(D))
    assert torch.equal(gy[4], torch.zeros(D))
    zeros = torch.zeros(3, D, requires_grad=True)
    same = losses.pair_loss(zeros, zeros, torch.tensor([True, False, False]), margin=1.0)
    same.backward()
    assert same.item() == pytest.approx(2 / 3)
    assert zeros.grad is not None
    assert torch.isfinite(zeros.grad).all()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_length_of_a_row_does_not_matter(size: float) -> None:
    x, y = _inputs(torch.float32)
    assert torch.allclose(losses.clip_loss(x * size, y, scale=10.0), losses.clip_loss(x, y, scale=10.0))


def test_all_rows_without_positives_give_zero() -> None:
    z = torch.randn(4, D, requires_grad=True)
    loss = losses.sup_con_loss(z, torch.arange(4), temperature=0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_mutual_information_bound() -> None:
    loss = torch.tensor(1.5, requires_grad=True)
    bound = losses.mutual_information_bound(loss, 64)
    assert bound.item() == pytest.approx(math.log(64) - 1.5)
    bound.backward()
    assert loss.grad is not None
    assert float(loss.grad) == -1.0
    assert float(losses.mutual_information_bound(0.0, torch.tensor(8))) == pytest.approx(math.log(8))
