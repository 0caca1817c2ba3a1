"""Properties of `contrast`: directions, permutations, bounds, statistics, queues and where no bound holds."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipkit.losses import ContrastOutput, clip_loss, contrast, mutual_information_bound

fast = settings(max_examples=40, deadline=None, derandomize=True)


def _rows(seed: int, n: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=g, dtype=dtype).requires_grad_() for _ in range(2))
    return x, y


@fast
@given(seed=st.integers(0, 2**31), n=st.integers(1, 8), m=st.integers(1, 8))
def test_both_directions_are_the_mean_of_one_and_of_its_transpose(seed: int, n: int, m: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(n, 4, generator=g, dtype=torch.float64)
    k = torch.randn(m, 4, generator=g, dtype=torch.float64)
    a = torch.randint(0, 3, (n,), generator=g)
    b = torch.randint(0, 3, (m,), generator=g)
    ignore = torch.rand(n, m, generator=g) < 0.2
    both = contrast(q, k, q_id=a, k_id=b, ignore=ignore, scale=3.0, direction="both")
    one = contrast(q, k, q_id=a, k_id=b, ignore=ignore, scale=3.0)
    other = contrast(k, q, q_id=b, k_id=a, ignore=ignore.T, scale=3.0)
    torch.testing.assert_close(both.loss, (one.loss + other.loss) / 2)
    torch.testing.assert_close(both.per_row, one.per_row)
    torch.testing.assert_close(both.per_column, other.per_row)
    assert both.rows == one.rows + other.rows
    assert both.skipped == one.skipped + other.skipped


@fast
@given(seed=st.integers(0, 2**31), n=st.integers(2, 9), scale=st.floats(0.1, 50))
def test_the_order_of_the_batch_does_not_matter(seed: int, n: int, scale: float) -> None:
    x, y = _rows(seed, n, 5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
    one, other = (contrast(a, b, scale=scale, direction="both") for a, b in ((x, y), (x[order], y[order])))
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.per_row[order], other.per_row)
    columns = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 2))
    ids = torch.arange(n)
    shuffled = contrast(x, y[columns], q_id=ids, k_id=ids[columns], scale=scale)
    torch.testing.assert_close(shuffled.per_row, one.per_row)


@fast
@given(n=st.integers(2, 40), scale=st.floats(0.01, 100))
def test_equal_rows_give_log_k_and_no_hit(n: int, scale: float) -> None:
    x = torch.ones(n, 3, dtype=torch.float64)
    out = contrast(x, x, scale=scale, direction="both")
    assert out.loss.item() == pytest.approx(math.log(n), abs=1e-9)
    assert out.candidates.item() == n
    assert out.mi_bound is not None
    assert out.mi_bound.item() == pytest.approx(0.0, abs=1e-9)
    assert out.accuracy is not None
    assert out.accuracy.item() == 0.0
    assert out.positive_similarity.item() == pytest.approx(1.0)
    assert out.negative_similarity.item() == pytest.approx(1.0)


@fast
@given(seed=st.integers(0, 2**31), n=st.integers(1, 9), scale=st.floats(0.1, 60))
def test_bounds(seed: int, n: int, scale: float) -> None:
    x, y = _rows(seed, n, 6)
    out = contrast(x, y, scale=scale, direction="both")
    assert 0 <= out.loss.item() <= math.log(n) + 2 * scale + 1e-9
    assert out.mi_bound is not None
    assert out.mi_bound.item() <= math.log(n) + 1e-12
    torch.testing.assert_close(out.mi_bound, mutual_information_bound(out.value, n))


@fast
@given(seed=st.integers(0, 2**31), scale=st.floats(0.5, 30))
def test_the_gradient_of_scale_is_its_finite_difference(seed: int, scale: float) -> None:
    x, y = (t.detach() for t in _rows(seed, 7, 4))
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(clip_loss(x, y, scale=s), s)
    h = 1e-5
    slope = (clip_loss(x, y, scale=scale + h) - clip_loss(x, y, scale=scale - h)) / (2 * h)
    assert gradient.item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def test_statistics_by_hand() -> None:
    q = torch.eye(3, dtype=torch.float64)
    k = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8], [0.0, 0.9, 0.1]], dtype=torch.float64)
    out = contrast(q, k)
    cos = k[2, 1].item() / k[2].norm().item(), k[2, 2].item() / k[2].norm().item()
    assert out.accuracy is not None
    assert out.accuracy.item() == pytest.approx(1 / 3)
    assert out.positive_similarity.item() == pytest.approx((1 + 0.6 + cos[1]) / 3)
    assert out.negative_similarity.item() == pytest.approx((cos[0] + 0.8) / 6)
    assert out.candidates.item() == 3


def test_a_queue_never_pushes_a_query_from_its_own_stale_key() -> None:
    q, k = _rows(0, 4, 5)
    queue = torch.cat([k.detach()[:2] * 0.9, torch.randn(6, 5, dtype=torch.float64)])
    ids = torch.arange(4)
    queue_id = torch.tensor([0, 1, 20, 21, 22, 23, 24, 25])
    out = contrast(q, k, q_id=ids, paired=True, negatives=queue, negative_id=queue_id, scale=5.0)
    without = contrast(q[:1], k[:1], paired=True, negatives=queue[1:], scale=5.0)
    torch.testing.assert_close(out.per_row[0], without.per_row[0])
    assert out.candidates.item() == pytest.approx((8 + 8 + 9 + 9) / 4)


def test_the_bound_is_none_where_it_is_not_one() -> None:
    x, y = _rows(1, 6, 4)
    labels, several = torch.arange(6), torch.arange(6) // 2

    def bound(**options: Any) -> Tensor | None:
        chosen: dict[str, Any] = {"scale": 4.0, **options}
        return contrast(x, y, **chosen).mi_bound

    assert bound() is not None
    assert bound(q_id=labels) is not None
    assert bound(denominator="one") is not None
    assert bound(paired=True, negatives=y.detach()) is not None
    assert bound(q_id=several) is None
    assert bound(denominator="neg") is None
    assert bound(link="logistic") is None
    assert bound(link="align", scale=1.0) is None
    assert bound(own_negatives=y[:, None]) is None
    assert bound(log_weight=0.5) is None
    assert bound(log_noise=0.5) is None
    assert bound(ignore=torch.zeros(6, 6, dtype=torch.bool)) is None
    assert bound(q_view=torch.zeros(6, dtype=torch.int64)) is None
    assert bound(q_id=labels, k_id=labels + 100) is None  # no row has a positive


def test_the_bound_stays_below_the_true_information() -> None:
    """Correlated Gaussians: I(x; y) = −d/2 log(1 − ρ²), scored with the optimal critic's shape."""
    g = torch.Generator().manual_seed(0)
    d, n = 2, 512
    for rho in (0.3, 0.8, 0.999999):
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
        y = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, d, generator=g, dtype=torch.float64)
        out = contrast(x, y / rho, scale=1.0, similarity="inner_product")
        best = out.mi_bound
        assert best is not None
        assert best.item() <= -d / 2 * math.log(1 - rho**2) + 0.05
        assert best.item() <= math.log(n)


def test_no_gradient_mode_and_frozen_sides() -> None:
    x, y = _rows(2, 5, 4)
    with torch.no_grad():
        assert not contrast(x, y, block=2).loss.requires_grad
    contrast(x.detach(), y, direction="both", block=2).loss.backward()
    assert x.grad is None
    assert y.grad is not None


def test_the_result_is_a_typed_output() -> None:
    x, y = _rows(2, 5, 4, torch.float32)
    out = contrast(x, y)
    assert isinstance(out, ContrastOutput)
    assert out.per_row.shape == (5,)
    assert out.per_column is None
    assert not out.value.requires_grad
    assert out.loss.requires_grad
