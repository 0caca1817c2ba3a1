"""The sweeps: no (N, M) matrix is kept, any tile gives the same numbers, in every mode of torch."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit import losses
from clipkit.errors import InputError
from clipkit.losses import contrast, sweep

LABELS = torch.tensor([0, 1, 2, 0, 3, 1, 4, 0, 2, 5, 3, 1, 6, 7, 2])


def rows(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = 0.5 * x + torch.randn(n, d, generator=g, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def both(x: Tensor, y: Tensor, scale: Any = 10.0, **options: Any) -> Tensor:
    return contrast(x, y, scale=scale, direction="both", **options).loss


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return found


LARGE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip_loss": lambda x, y: losses.clip_loss(x, y, scale=10.0),
    "siglip_loss": lambda x, y: losses.siglip_loss(x, y, scale=10.0, bias=-10.0),
    "nt_xent_loss": lambda x, y: losses.nt_xent_loss(x, y, temperature=0.1),
    "sup_con_loss": lambda x, y: losses.sup_con_loss(x + y, torch.arange(len(x)) // 3, temperature=0.1),
    "info_nce_loss with a queue": lambda x, y: losses.info_nce_loss(
        x, y, negatives=y.detach(), temperature=0.1
    ),
    "hinge": lambda x, y: contrast(x, y, link="hinge", margin=0.2).loss,
    "one positive at a time": lambda x, y: (
        contrast(x, y, q_id=torch.arange(len(x)) // 2, denominator="one", direction="both").loss
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_matrix_of_all_pairs_exists_or_is_saved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4,200² scores are more than may be kept here: none of the tensors has a quarter of them."""
    monkeypatch.setattr(sweep, "KEPT_BYTES", 64 << 20)
    x, y = rows(4200, 4, torch.float32)
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with LargestTensor() as mode, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        LARGE[name](x, y).backward()
    assert 0 < mode.largest <= 4200**2 / 4
    assert 0 < max(saved) <= 4 * 4200 * 8


def test_scores_are_kept_where_they_fit_and_give_the_same_numbers() -> None:
    x, y = rows(300, 8)
    saved: list[int] = []

    def note(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept = both(x, y)
    assert max(saved) == 300 * 300
    again = both(x, y, block=300)
    assert torch.equal(kept, again)
    for a, b in zip(torch.autograd.grad(kept, [x, y]), torch.autograd.grad(again, [x, y]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("link", ["softmax", "logistic", "hinge", "in", "one", "neg"])
def test_the_size_of_a_tile_changes_nothing(link: str, dtype: torch.dtype) -> None:
    n = len(LABELS)
    x, y = rows(n, 6, dtype)
    options: dict[str, Any] = {"scale": 4.0, "q_id": LABELS, "direction": "both"}
    if link in ("logistic", "hinge"):
        options["link"] = link
    elif link != "softmax":
        options["aggregate" if link == "in" else "denominator"] = link
    if link == "hinge":
        options["margin"] = 0.3
    whole = contrast(x, y, **options)
    expected = torch.autograd.grad(whole.loss, [x, y])
    close = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 0.02)
    for block in (1, 2, 7, n):
        tiled = contrast(x, y, **options, block=block)
        torch.testing.assert_close(tiled.loss, whole.loss, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(tiled.negative_similarity, whole.negative_similarity)
        torch.testing.assert_close(tiled.positive_similarity, whole.positive_similarity)
        assert tiled.accuracy == whole.accuracy
        for a, b in zip(torch.autograd.grad(tiled.loss, [x, y]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=close, atol=close * 0.1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 9), m=st.integers(1, 9), block=st.integers(1, 10), seed=st.integers(0, 2**31),
    spread=st.sampled_from([1.0, 30.0, 1e4]),
)  # fmt: skip
def test_scores_of_any_range_in_any_tile(n: int, m: int, block: int, seed: int, spread: float) -> None:
    """Rows and columns whose scores differ by more than a float32 exponential can hold share no reference."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(n, 3, generator=g) * torch.rand(n, 1, generator=g) * spread
    k = torch.randn(m, 3, generator=g) * torch.rand(m, 1, generator=g)
    a, b = (torch.randint(0, 3, (s,), generator=g) for s in (n, m))
    q, k = q.requires_grad_(), k.requires_grad_()

    def evaluate(x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, ...]:
        out = contrast(x, y, q_id=a, k_id=b, similarity="inner_product", direction="both", **options)
        return out.loss, *torch.autograd.grad(out.loss, [x, y])

    wide = evaluate(q.double().detach().requires_grad_(), k.double().detach().requires_grad_())
    for mine, right in zip(evaluate(q, k, block=block), wide, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-5 * max(1.0, spread))


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize(
    "options", [{}, {"aggregate": "in"}, {"denominator": "neg"}, {"link": "logistic"}, {"link": "nce"}]
)
def test_gradients_by_finite_differences(options: dict[str, Any], block: int | None) -> None:
    x, y = rows(5, 3)
    scale, bias, noise = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for v in (3.0, -0.5, [0.1, 0.4, 1.0, 0.0, 0.2])
    )

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, noise: Tensor) -> Tensor:
        return contrast(
            x, y, scale=scale, bias=bias, log_noise=noise, q_id=LABELS[:5], direction="both", block=block,
            **options,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (x, y, scale, bias, noise))


def test_losses_of_rows_and_columns_can_be_used_one_by_one() -> None:
    x, y = rows(7, 4)
    weigh = torch.linspace(-1, 2, 7, dtype=torch.float64)
    out = contrast(x, y, scale=5.0, direction="both", block=3)
    assert out.per_column is not None
    mine = torch.autograd.grad((out.per_row * weigh).sum() + out.per_column[2], [x, y])
    scores = 5.0 * torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(y, dim=1).T
    right = (-scores.log_softmax(1).diag() * weigh).sum() - scores.log_softmax(0)[2, 2]
    for a, b in zip(mine, torch.autograd.grad(right, [x, y]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_graph_that_is_retained_gives_the_same_gradient_again() -> None:
    x, y = rows(9, 4, torch.float32)
    for loss in (both(x, y), losses.siglip_loss(x, y, scale=5.0, bias=-1.0), both(x, y, block=4)):
        first = torch.autograd.grad(loss, [x, y], retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, [x, y])))


def test_second_derivatives_are_refused_and_not_wrong() -> None:
    x, y = rows(4, 3)
    (gradient,) = torch.autograd.grad(both(x, y), x, create_graph=True)
    with pytest.raises(InputError, match="second derivatives are not implemented"):
        gradient.square().sum().backward()
    fine, _ = torch.autograd.grad(both(x, y) + x.square().sum() * 0, [x, y], create_graph=True)
    torch.testing.assert_close(fine.detach(), gradient.detach())


def test_under_autocast_scores_stay_wide() -> None:
    x, y = rows(33, 16, torch.float32)
    scale = torch.tensor(100.0, requires_grad=True)
    plain = both(x, y, scale)
    expected = torch.autograd.grad(plain, [x, y, scale])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = both(x, y, scale)
        found = torch.autograd.grad(loss, [x, y, scale])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("scale", [4.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_features_lose_nothing_but_their_own_rounding(
    dtype: torch.dtype, scale: float, block: int | None
) -> None:
    x, y = rows(40, 16, dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    loss, right = both(x, y, scale, block=block), both(wide[0], wide[1], scale)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(loss, [x, y]), torch.autograd.grad(right, wide), strict=True):
        assert a.dtype == dtype
        if dtype == torch.float16:  # bfloat16 gradients are products in bfloat16 on some processors
            torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (a.double() - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max()


def test_narrow_scores_far_below_zero_are_not_rounded() -> None:
    """What a softmax sees are differences: at −200 a bfloat16 score is wrong by a half."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.full((40, 1), 20.0), torch.randn(40, 15, generator=g)], 1).bfloat16()
    y = torch.cat([torch.full((40, 1), -10.0), torch.randn(40, 15, generator=g)], 1).bfloat16()

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        p, q = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        loss = contrast(p, q, similarity="inner_product", direction="both", block=16).loss
        return torch.autograd.grad(loss, [p, q])

    for a, b in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert (a.double() - b).abs().max() <= torch.finfo(torch.bfloat16).eps * b.abs().max()


def test_one_side_narrow_and_one_wide() -> None:
    x, y = rows(6, 4, torch.bfloat16)
    other = y.detach().double().requires_grad_()
    gx, gy = torch.autograd.grad(both(x, other), [x, other])
    assert (gx.dtype, gy.dtype) == (torch.bfloat16, torch.float64)


def test_inputs_that_are_not_contiguous() -> None:
    x, y = rows(8, 6)
    expected = torch.autograd.grad(both(x, y), [x, y])
    turned = [t.detach().T.contiguous().T.requires_grad_() for t in (x, y)]
    strided = [torch.stack([t.detach()] * 2, 1)[:, 0].requires_grad_() for t in (x, y)]
    assert not turned[0].is_contiguous()
    for inputs in (turned, strided, [x.detach().expand(8, 6).requires_grad_(), y]):
        for block in (None, 3):
            found = torch.autograd.grad(both(*inputs, block=block), inputs)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
    line = torch.randn(1, 6, dtype=torch.float64).expand(8, 6).requires_grad_()
    assert torch.autograd.grad(both(line, y), line)[0].shape == (8, 6)


COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip_loss": lambda x, y: losses.clip_loss(x, y, scale=x.square().mean().exp()),
    "siglip_loss": lambda x, y: losses.siglip_loss(x, y, scale=3.0, bias=-1.0),
    "nt_xent_loss": lambda x, y: losses.nt_xent_loss(x, y, temperature=0.2),
    "sup_con_loss": lambda x, y: losses.sup_con_loss(x + y, LABELS, temperature=0.2),
    "info_nce_loss": lambda x, y: losses.info_nce_loss(x, y, negatives=y.flip(0), temperature=0.2),
    "nce_loss": lambda x, y: losses.nce_loss(
        x, y, torch.stack([x, y], 1), temperature=0.2, log_z=1.0, num_noise_population=9
    ),
    "triplet_loss": lambda x, y: losses.triplet_loss(x, y, y.flip(0), margin=0.4),
    "pair_loss": lambda x, y: losses.pair_loss(x, y, LABELS > 2, margin=0.4),
    "hinge in both directions": lambda x, y: (
        contrast(x, y, q_id=LABELS, link="hinge", margin=0.4, direction="both").loss
    ),
    "parts of the output": lambda x, y: (
        contrast(x, y, q_id=LABELS).per_row.square().sum() + contrast(x, y).negative_similarity
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_caller_gets_one_graph_and_the_same_numbers(name: str) -> None:
    x, y = rows(len(LABELS), 5, torch.float32)
    loss = COMPILED[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: 2 * loss(x * 3, y), backend="aot_eager", fullgraph=True)
    mine, right = compiled(x, y), 2 * loss(x * 3, y)
    torch.testing.assert_close(mine, right)
    grads = torch.autograd.grad(mine, [x, y]), torch.autograd.grad(right, [x, y])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_without_gradients_nothing_is_kept() -> None:
    x, y = rows(50, 4, torch.float32)
    saved: list[int] = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(1), lambda t: t),
    ):
        out = contrast(x, y, scale=3.0, direction="both")
    assert not out.loss.requires_grad
    assert saved == []


def test_nan_in_a_feature_is_nan_in_the_loss() -> None:
    x, y = rows(4, 3, torch.float32)
    with torch.no_grad():
        x[1, 1] = math.nan
    out = contrast(x, y, scale=3.0, direction="both")
    assert math.isnan(out.loss.item())
    assert math.isnan(out.per_row[1].item())
    assert not out.per_row[[0, 2, 3]].isnan().any()


def test_the_bound_says_when_it_is_saturated() -> None:
    x, y = rows(64, 16)
    far = contrast(x, y, scale=1.0, direction="both")
    assert far.saturated is False
    near = contrast(x, x, scale=100.0, direction="both")
    assert near.saturated is True
    assert contrast(x, y, link="logistic").saturated is None
