"""Alignment and uniformity against their formulas in float64, and at the ends of their ranges."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.errors import InputError
from clipkit.losses import alignment_loss
from clipkit.losses.geometry import alignment, uniformity


def made(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def papers_alignment(x: Tensor, y: Tensor, *, alpha: float) -> Tensor:
    return (F.normalize(x) - F.normalize(y)).norm(p=2, dim=1).pow(alpha).mean()


def papers_uniformity(x: Tensor, t: float) -> Tensor:
    return torch.pdist(F.normalize(x), p=2).pow(2).mul(-t).exp().mean().log()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_alignment_is_that_of_the_paper(alpha: float, dtype: torch.dtype) -> None:
    x, y = made(9, 5, dtype), made(9, 5, dtype, seed=1)
    wide = [v.detach().double().requires_grad_() for v in (x, y)]
    got, expected = alignment(x, y, alpha=alpha), papers_alignment(*wide, alpha=alpha)
    assert got.shape == ()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    got.backward()
    expected.backward()
    for v, w in zip((x, y), wide, strict=True):
        assert v.grad is not None
        assert v.grad.dtype == dtype
        close = max(tolerance, torch.finfo(dtype).eps)
        torch.testing.assert_close(v.grad.double(), w.grad, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("n", [2, 3, 40])
def test_uniformity_is_that_of_the_paper(n: int, t: float, dtype: torch.dtype) -> None:
    x = made(n, 5, dtype)
    wide = x.detach().double().requires_grad_()
    got, expected = uniformity(x, t=t), papers_uniformity(wide, t)
    assert got.shape == ()
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    got.backward()
    expected.backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert x.grad.dtype == dtype
    close = 1e-11 if dtype == torch.float64 else max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=close, atol=close)


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda x, y: alignment(x, y, alpha=1.5), [made(4, 3), made(4, 3, seed=1)])
    assert torch.autograd.gradcheck(lambda x: uniformity(x, t=1.5), [made(5, 3)])


def test_with_alpha_2_the_value_is_that_of_alignment_loss_and_both_sides_get_a_gradient() -> None:
    x, y = made(6, 4), made(6, 4, seed=1)
    value = alignment(x, y)
    torch.testing.assert_close(value, alignment_loss(x, y))
    value.backward()
    assert x.grad is not None
    assert y.grad is not None
    assert float(y.grad.abs().max()) > 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_identical_pairs_are_aligned_without_a_gradient(alpha: float) -> None:
    x = made(6, 4, torch.float32)
    value = alignment(x, (x * 2).detach(), alpha=alpha)
    value.backward()
    assert value.item() == 0.0
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x.grad))


def test_opposite_pairs_have_the_largest_alignment() -> None:
    x = made(6, 4)
    assert alignment(x, -3 * x, alpha=3.0).item() == pytest.approx(8.0, rel=1e-12)


@pytest.mark.parametrize("t", [0.1, 2.0, 50.0])
@pytest.mark.parametrize("n", [2, 17, 300])
def test_collapsed_rows_have_uniformity_0(n: int, t: float) -> None:
    x = torch.full((n, 3), 0.7)
    assert uniformity(x, t=t).item() == pytest.approx(0.0, abs=2e-6 * max(1.0, t))
    assert uniformity(x.double(), t=t).item() == pytest.approx(0.0, abs=1e-13 * max(1.0, t))


def test_well_spread_rows_have_a_low_uniformity() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    poles = torch.cat([axes, -axes])  # 24 pairs at √2, 4 at 2
    expected = math.log((24 * math.exp(-2 * 2) + 4 * math.exp(-2 * 4)) / 28)
    assert uniformity(poles).item() == pytest.approx(expected, rel=1e-12)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert uniformity(opposite, t=2.0).item() == pytest.approx(-8.0, rel=1e-6)
    assert uniformity(opposite, t=200.0).item() == pytest.approx(-800.0, rel=1e-6)  # e^-800 itself is 0


def test_a_row_of_zeros_is_finite_and_gets_no_gradient() -> None:
    x, y = made(4, 3, torch.float32), made(4, 3, torch.float32, seed=1)
    with torch.no_grad():
        x[1] = 0
    (alignment(x, y) + uniformity(x)).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[1], torch.zeros(3))


def test_autocast_changes_nothing() -> None:
    x, y = made(8, 4, torch.float32), made(8, 4, torch.float32, seed=1)
    expected = alignment(x, y), uniformity(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = alignment(x, y), uniformity(x)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_many_rows_never_make_a_matrix_of_all_pairs() -> None:
    n = 2100
    x = made(n, 2, torch.float32)
    with Largest() as largest:
        value = uniformity(x)
        value.backward()
    assert n < largest.elements < n * n
    assert value.item() == pytest.approx(papers_uniformity(x.detach(), 2.0).item(), abs=1e-5)


X, Y = torch.randn(4, 3), torch.randn(5, 3)
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: alignment(X, Y), r"x \(4, 3\) .* and y \(5, 3\)"),
    (lambda: alignment(X.long(), X), r"x must be a floating tensor of shape \(N, D\), got \(4, 3\) .*int64"),
    (lambda: alignment(X[:0], X[:0]), r"x \(0, 3\) .* has no rows"),
    (lambda: alignment(X, X, alpha=0.0), r"alpha must be finite and > 0, got 0"),
    (lambda: alignment(X, X, alpha=math.inf), r"alpha must be finite and > 0, got inf"),
    (lambda: uniformity(X[:1]), r"x \(1, 3\) .* at least 2 rows"),
    (lambda: uniformity(X[0]), r"x must be .* got \(3,\)"),
    (lambda: uniformity(X[:, :0]), r"no features"),
    (lambda: uniformity(X, t=-1.0), r"t must be finite and > 0, got -1"),
    (lambda: uniformity(X, t="2"), r"t must be a number"),  # type: ignore
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_is_refused_by_name(case: int) -> None:
    wrong, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        wrong()
