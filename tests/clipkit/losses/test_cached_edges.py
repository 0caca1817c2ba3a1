"""`cached_backward` at the edges: what it keeps in memory, what an error leaves, what it refuses."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clipkit.errors import InputError
from clipkit.losses import contrast
from clipkit.losses.cached import cached_backward

LINEAR = nn.Linear(3, 2)
X = torch.randn(4, 3)


def mean(*features: Tensor) -> Tensor:
    return torch.stack([f.pow(2).mean() for f in features]).sum()


class Marked(torch.autograd.Function):
    """The identity; counts how many of its nodes are alive."""

    alive = peak = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark = Mark()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


class Mark:
    def __init__(self) -> None:
        Marked.alive += 1
        Marked.peak = max(Marked.peak, Marked.alive)

    def __del__(self) -> None:
        Marked.alive -= 1


def test_only_one_chunk_has_a_graph_at_a_time() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(7, 3)

    def encode(rows: Tensor) -> Tensor:
        return Marked.apply(linear(rows))  # pyright: ignore[reportReturnType]

    cached_backward([encode, encode], [x, x], mean, chunk_size=2, modules=[linear])
    assert (Marked.alive, Marked.peak) == (0, 1)
    kept = [encode(x[i : i + 2]) for i in range(0, 7, 2)]
    assert Marked.peak == len(kept)  # the count sees what a graph for all chunks would keep


def test_features_that_are_a_view_do_not_keep_what_they_are_a_view_of() -> None:
    hidden: list[weakref.ref[np.ndarray]] = []
    scale = nn.Parameter(torch.tensor(1.0))

    def first_token(x: Tensor) -> Tensor:
        assert all(ref() is None for ref in hidden)
        memory = np.ones((len(x), 5, 6), np.float32)
        hidden.append(weakref.ref(memory))
        return torch.from_numpy(memory)[:, 0]  # a tensor that shares the array's memory

    cached_backward([first_token], [torch.ones(7, 1)], lambda z: (z * scale).sum(), chunk_size=2, modules=[])
    assert len(hidden) == 4
    assert scale.grad is not None
    assert scale.grad.item() == 7 * 6


@pytest.mark.parametrize("breaks_at", [1, 2, 4, 5])
def test_an_error_leaves_gradients_and_random_numbers_as_they_were(breaks_at: int) -> None:
    """At one of the calls of the second encoder: two in the first pass, two in the second."""
    linear, dropout, calls = nn.Linear(3, 2), nn.Dropout(0.4), []
    linear.weight.grad = torch.ones_like(linear.weight)

    def encode(x: Tensor) -> Tensor:
        return dropout(linear(x))

    def breaking(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == breaks_at:
            raise RuntimeError("out of memory")
        return encode(x)

    def loss(*features: Tensor) -> Tensor:
        calls.append(0)
        return mean(*features)

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_backward([encode, breaking], [X, X], loss, chunk_size=2, modules=[linear])
    assert calls == [2, 2, 0, 2, 2][:breaks_at]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(linear.weight.grad, torch.ones_like(linear.weight))
    assert linear.bias.grad is None


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(8), nn.SyncBatchNorm(8), nn.BatchNorm1d(8, track_running_stats=False).eval()],
    ids=["BatchNorm1d", "SyncBatchNorm", "without running statistics"],
)
def test_batch_statistics_are_refused(norm: nn.Module) -> None:
    encoder, x = Normed(norm), torch.randn(6, 4)
    with pytest.raises(InputError, match=r"Norm.* 'stem.1' of Normed .* eval mode.* GroupNorm"):
        cached_backward([encoder], [x], lambda z: z.pow(2).mean(), chunk_size=2)
    with pytest.raises(InputError, match=r"'stem.1' of Normed"):
        cached_backward([lambda x: x], [x], lambda z: z.mean(), chunk_size=2, modules=[encoder])


def test_batch_norm_in_eval_mode_is_a_function_of_each_row() -> None:
    encoder, x = Normed(nn.BatchNorm1d(8)).eval(), torch.randn(6, 4)
    cached_backward([encoder], [x], lambda z: z.pow(3).mean(), chunk_size=4)
    got = [p.grad for p in encoder.parameters()]
    expected = torch.autograd.grad(encoder(x).pow(3).mean(), list(encoder.parameters()))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)


def call(
    encoders: Sequence[Any] = (LINEAR,),
    inputs: Sequence[Any] = (X,),
    loss: Callable[..., Any] = mean,
    chunk_size: Any = 2,
    **options: Any,
) -> Callable[[], Tensor]:
    return lambda: cached_backward(encoders, inputs, loss, chunk_size=chunk_size, **options)


WRONG = [
    (call(chunk_size=0), r"chunk_size must be an integer >= 1, got 0"),
    (call(chunk_size=True), r"chunk_size must be an integer >= 1, got True"),
    (call(encoders=[], inputs=[]), r"every encoder needs its input, got 0 encoders"),
    (call(encoders=[LINEAR, LINEAR]), r"every encoder needs its input, got 2 encoders, 1 inputs"),
    (call(encoders=[lambda x: LINEAR(x)]), r"encoders\[0\] is no module and no method of one: .* modules="),
    (call(inputs=["text"]), r"inputs\[0\] must be a tensor, or a tuple or dict of tensors .* got str"),
    (call(inputs=[()]), r"inputs\[0\] must be .* got tuple"),
    (call(inputs=[torch.tensor(1.0)]), r"inputs\[0\] must be .* got \(\) torch.float32"),
    (call(inputs=[(X, 3)]), r"inputs\[0\] must be .* got \(4, 3\) torch.float32, int"),
    (call(inputs=[{"x": X, "y": X[:3]}]), r"same first axis, got \(4, 3\) .*, \(3, 3\)"),
    (call(inputs=[X.clone().requires_grad_() * 2]), r"inputs\[0\] comes with a graph: detach it"),
    (call(encoders=[nn.Flatten(0)]), r"an encoder must return .* each of its 2 input rows, got \(6,\)"),
    (call(encoders=[lambda x: [x]], modules=[]), r"an encoder must return one floating tensor .* got list"),
    (call(encoders=[lambda x: x.long()], modules=[]), r"an encoder must return one floating .*int64"),
    (call(loss=lambda z: z), r"loss must return a scalar tensor, got \(4, 2\)"),
    (call(loss=lambda z: contrast(z, z.detach())), r"loss must return a scalar tensor, got ContrastOutput"),
    (call(loss=lambda z: mean(z.detach())), r"nothing needs a gradient"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_is_refused_by_name(case: int) -> None:
    wrong, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        wrong()
    assert LINEAR.weight.grad is None
