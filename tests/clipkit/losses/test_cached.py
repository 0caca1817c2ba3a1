"""`cached_backward` leaves the gradients that one backward pass over the whole batch leaves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.losses import clip_loss, nt_xent_loss
from clipkit.losses.cached import cached_backward

N, D = 7, 6
CHUNKS = [1, 2, 3, 7, 64]


class RowDropout(nn.Module):
    """Dropout whose numbers come one after another, so that chunks draw what the whole batch draws."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape) < 0.7).to(x.dtype) / 0.7


class Model(nn.Module):
    """An image tower with GroupNorm, a text tower with LayerNorm, and the scale of the loss."""

    def __init__(self, dropout: Callable[[], nn.Module] = RowDropout) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.GELU(), nn.Flatten(), dropout(), nn.Linear(8 * 9, D)
        )
        self.text = nn.Sequential(
            nn.Embedding(11, 8),
            nn.Flatten(),
            nn.Linear(32, 16),
            nn.LayerNorm(16),
            dropout(),
            nn.Linear(16, D),
        )
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.image(pixels)

    def encode_text(self, ids: Tensor) -> Tensor:
        return self.text(ids)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return clip_loss(image, text, scale=self.log_scale.exp())


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    return torch.randn(n, 3, 5, 5, generator=g), torch.randint(11, (n, 4), generator=g)


def cached(model: Model, chunk_size: int = 3, **options: Any) -> Tensor:
    return cached_backward(
        [model.encode_image, model.encode_text], batch(), model.loss, chunk_size=chunk_size, **options
    )


def chunked(encoder: Callable[[Any], Tensor], x: Tensor, chunk_size: int) -> Tensor:
    """Features with the graphs of all chunks: what a chunk draws, and the gradient of all."""
    return torch.cat([encoder(x[i : i + chunk_size]) for i in range(0, len(x), chunk_size)])


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Equal up to `tolerance` × the largest gradient of all."""
    largest = max(float(e.abs().max()) for e in expected.values() if e is not None)
    assert largest > 0
    for name, e in expected.items():
        g = got[name]
        assert (g is None) == (e is None), name
        if g is not None and e is not None:
            assert float((g.double() - e.double()).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gradients_are_those_of_the_whole_batch(chunk_size: int, dtype: torch.dtype) -> None:
    model, whole = Model().to(dtype), Model().to(dtype)
    images, texts = batch()
    torch.manual_seed(9)
    value = cached_backward(
        [model.encode_image, model.encode_text], [images.to(dtype), texts], model.loss, chunk_size=chunk_size
    )
    torch.manual_seed(9)
    expected = whole.loss(whole.encode_image(images.to(dtype)), whole.encode_text(texts))
    expected.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=tolerance, atol=tolerance)
    assert_same(gradients(model), gradients(whole), tolerance)
    assert model.log_scale.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_a_float64_loop_over_rows(dtype: torch.dtype) -> None:
    model, naive = Model(nn.Identity).to(dtype), Model(nn.Identity).double()
    pixels, ids = batch()
    value = cached_backward(
        [model.encode_image, model.encode_text], [pixels.to(dtype), ids], model.loss, chunk_size=3
    )
    image = [naive.encode_image(row[None])[0] for row in pixels.double()]
    text = [naive.encode_text(row[None])[0] for row in ids]
    image, text = [x / x.pow(2).sum().sqrt() for x in image], [x / x.pow(2).sum().sqrt() for x in text]
    terms = []
    for i in range(N):
        row = torch.stack([naive.log_scale.exp() * (image[i] * text[j]).sum() for j in range(N)])
        column = torch.stack([naive.log_scale.exp() * (image[j] * text[i]).sum() for j in range(N)])
        terms += [row.exp().sum().log() - row[i], column.exp().sum().log() - column[i]]
    expected = torch.stack(terms).mean()
    expected.backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert float(value) == pytest.approx(expected.item(), rel=tolerance)
    assert_same(gradients(model), gradients(naive), tolerance)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_one_encoder_used_twice_replays_the_dropout_of_each_use(chunk_size: int) -> None:
    model, whole = (Model(lambda: nn.Dropout(0.4)) for _ in range(2))
    ids, seen = batch()[1], []

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        seen.append((z1.detach(), z2.detach()))
        return nt_xent_loss(z1, z2, temperature=0.5)

    torch.manual_seed(9)
    value = cached_backward([model.encode_text] * 2, [ids] * 2, loss, chunk_size=chunk_size)
    torch.manual_seed(9)
    expected = loss(*(chunked(whole.encode_text, ids, chunk_size) for _ in range(2)))
    expected.backward()
    assert not torch.allclose(*seen[0])  # dropout differs between the two uses
    assert torch.equal(value, expected.detach())
    assert_same(gradients(model), gradients(whole), 1e-6)


def test_random_numbers_go_on_as_after_the_first_pass() -> None:
    model, whole = (Model(lambda: nn.Dropout(0.4)) for _ in range(2))

    def noisy(m: Model) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda image, text: m.loss(image + torch.rand(N, D), text)

    torch.manual_seed(9)
    cached_backward([model.encode_image, model.encode_text], batch(), noisy(model), chunk_size=3)
    after = torch.rand(5)
    torch.manual_seed(9)
    images, texts = batch()
    noisy(whole)(chunked(whole.encode_image, images, 3), chunked(whole.encode_text, texts, 3)).backward()
    assert torch.equal(after, torch.rand(5))
    assert_same(gradients(model), gradients(whole), 1e-6)


def test_gradients_are_added_to_those_that_are_there() -> None:
    model, once = Model(nn.Identity), Model(nn.Identity)
    cached(once)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    tensors = [p.grad for p in model.parameters()]
    cached(model)
    assert all(p.grad is t for p, t in zip(model.parameters(), tensors, strict=True))
    assert_same(gradients(model), {n: g + 0.5 for n, g in gradients(once).items() if g is not None}, 1e-6)


def test_a_gradient_scaler_scales_once() -> None:
    model, plain = Model(nn.Identity), Model(nn.Identity)
    expected = cached(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    value = cached(model, backward=lambda loss: scaler.scale(loss).backward())
    assert torch.equal(value, expected)
    assert_same(gradients(model), {n: g * 1024 for n, g in gradients(plain).items() if g is not None}, 1e-6)
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    assert_same(gradients(model), gradients(plain), 1e-6)


def test_autocast_holds_in_both_passes_but_not_in_backward() -> None:
    model, whole = Model(), Model()
    in_backward: list[bool] = []

    def loss(image: Tensor, text: Tensor) -> Tensor:
        image.register_hook(lambda _: in_backward.append(torch.is_autocast_enabled("cpu")))
        return model.loss(image, text)

    def encode_image(pixels: Tensor) -> Tensor:
        features = model.encode_image(pixels)
        if features.requires_grad:
            features.register_hook(lambda _: in_backward.append(torch.is_autocast_enabled("cpu")))
        return features

    torch.manual_seed(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = cached_backward(
            [encode_image, model.encode_text], batch(), loss, chunk_size=3, modules=[model]
        )
    assert in_backward == [False] * 4  # the loss, and three chunks
    torch.manual_seed(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole.loss(*(f(x) for f, x in zip((whole.image, whole.text), batch(), strict=True)))
    expected.backward()
    wide = Model()
    torch.manual_seed(9)
    assert float(value) != float(cached(wide))  # it was bfloat16 indeed
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(whole), 0.01)


def test_inputs_may_be_tuples_and_dicts() -> None:
    model, plain = Model(nn.Identity), Model(nn.Identity)
    images, texts = batch()
    shift = torch.arange(float(N))[:, None]
    value = cached_backward(
        [lambda x: model.encode_image(x[0]) + x[1], lambda x: model.encode_text(x["ids"]) - x["shift"]],
        [(images, shift), {"ids": texts, "shift": shift}],
        model.loss,
        chunk_size=2,
        modules=[model],
    )
    expected = plain.loss(plain.encode_image(images) + shift, plain.encode_text(texts) - shift)
    expected.backward()
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), gradients(plain), 1e-6)


def test_inputs_that_need_a_gradient_get_it() -> None:
    model, plain = Model(nn.Identity), Model(nn.Identity)
    images, texts = batch()
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    cached_backward([model.encode_image, model.encode_text], [x, texts], model.loss, chunk_size=2)
    plain.loss(plain.encode_image(y), plain.encode_text(texts)).backward()
    assert_same({"input": x.grad}, {"input": y.grad}, 1e-6)


class Counting(nn.Module):
    """An encoder that remembers the rows of each call, and whether it had a graph."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.calls, self.graphs = encoder, [], []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        self.graphs.append(torch.is_grad_enabled())
        return self.encoder(x)


def test_frozen_encoders_run_once() -> None:
    model = Model()
    model.image.requires_grad_(False)
    image, text = Counting(model.image), Counting(model.text)
    needs: list[bool] = []

    def loss(*features: Tensor) -> Tensor:
        needs.extend(x.requires_grad for x in features)
        return model.loss(*features)

    cached_backward([image, text], batch(), loss, chunk_size=3)
    assert image.calls == [3, 3, 1]
    assert text.calls == [3, 3, 1] * 2
    assert text.graphs == [True, False, False] + [True] * 3  # the first tells whether a gradient is needed
    assert needs == [False, True]
    assert all(p.grad is None for p in model.image.parameters())
    model.zero_grad()
    cached_backward([image, image], [batch()[0]] * 2, loss, chunk_size=4)  # only the scale is left to learn
    assert image.calls == [3, 3, 1] + [4, 3] * 2
    assert model.log_scale.grad is not None


def test_the_loss_may_be_any_function_of_the_features() -> None:
    model, plain = Model(nn.Identity), Model(nn.Identity)
    images, texts = batch()

    def loss(image: Tensor, text: Tensor, unused: Tensor) -> Tensor:
        return F.mse_loss(image, text.flip(0)) + image.std(0).prod() + text[2].max()

    third = nn.Linear(2, 3)
    cached_backward(
        [model.encode_image, model.encode_text, third], [images, texts, torch.ones(5, 2)], loss, chunk_size=2
    )
    loss(plain.encode_image(images), plain.encode_text(texts), torch.ones(5, 2)).backward()
    assert_same(gradients(model), gradients(plain), 1e-6)
    assert third.weight.grad is None  # as after backward(): it is not in the graph


def test_it_works_where_gradients_are_switched_off() -> None:
    model, plain = Model(nn.Identity), Model(nn.Identity)
    with torch.no_grad():
        cached(model, backward=lambda loss: (loss * 1.0).backward())
    cached(plain)
    assert_same(gradients(model), gradients(plain), 0.0)
