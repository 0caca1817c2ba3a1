"""Every public loss against a naive float64 loop written from its formula: value and every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipkit import losses


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum().sqrt()


def sim(x: Tensor, y: Tensor) -> Tensor:
    return (unit(x) * unit(y)).sum()


def distance(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).pow(2).sum().sqrt()


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


def cross_entropy(scores: list[Tensor], target: int) -> Tensor:
    return torch.log(torch.stack([s.exp() for s in scores]).sum()) - scores[target]


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    n = range(len(image))
    rows = [cross_entropy([scale * sim(image[i], text[j]) for j in n], i) for i in n]
    columns = [cross_entropy([scale * sim(image[i], text[j]) for i in n], j) for j in n]
    return (mean(rows) + mean(columns)) / 2


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    n = range(len(image))
    terms = []
    for i in n:
        for j in n:
            sign = 1 if i == j else -1
            terms.append(-log_sigmoid(sign * (scale * sim(image[i], text[j]) + bias)))
    return torch.stack(terms).sum() / len(image)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    z, n, terms = torch.cat([z1, z2]), len(z1), []
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        scores = [sim(z[i], z[j]) / temperature for j in others]
        terms.append(cross_entropy(scores, others.index((i + n) % (2 * n))))
    return mean(terms)


def info_nce(query: Tensor, positive: Tensor, temperature: float) -> Tensor:
    n = range(len(query))
    return mean([cross_entropy([sim(query[i], positive[j]) / temperature for j in n], i) for i in n])


def info_nce_queue(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    terms = []
    for q, p in zip(query, positive, strict=True):
        scores = [sim(q, p) / temperature] + [sim(q, k) / temperature for k in negatives]
        terms.append(cross_entropy(scores, 0))
    return mean(terms)


def sup_con(z: Tensor, labels: list[int], temperature: float) -> Tensor:
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [others.index(j) for j in others if labels[j] == labels[i]]
        scores = [sim(z[i], z[j]) / temperature for j in others]
        if positives:
            terms.append(mean([cross_entropy(scores, p) for p in positives]))
    return mean(terms)


def nce(
    query: Tensor, positive: Tensor, noise: Tensor, log_z: Tensor, temperature: float, population: int
) -> Tensor:
    """In the paper's probabilities: h = P / (P + m/N), not in logits."""
    m, terms = noise.shape[1], []

    def h(q: Tensor, k: Tensor) -> Tensor:
        p = torch.exp(sim(q, k) / temperature) / log_z.exp()
        return p / (p + m / population)

    for i in range(len(query)):
        term = -torch.log(h(query[i], positive[i]))
        for k in noise[i]:
            term = term - torch.log(1 - h(query[i], k))
        terms.append(term)
    return mean(terms)


def logistic(u: Tensor, v: Tensor, negatives: Tensor, weight: float) -> Tensor:
    terms = []
    for i in range(len(u)):
        mine = negatives if negatives.dim() == 2 else negatives[i]
        term = -log_sigmoid(u[i] @ v[i])
        for n in mine:
            term = term - weight * log_sigmoid(-(u[i] @ n))
        terms.append(term)
    return mean(terms)


def triplet(a: Tensor, p: Tensor, n: Tensor, margin: float) -> Tensor:
    return mean([(distance(a[i], p[i]) - distance(a[i], n[i]) + margin).clamp(min=0) for i in range(len(a))])


def triplet_cosine(a: Tensor, p: Tensor, n: Tensor, margin: float) -> Tensor:
    return mean(
        [((1 - sim(a[i], p[i])) - (1 - sim(a[i], n[i])) + margin).clamp(min=0) for i in range(len(a))]
    )


def pair(x1: Tensor, x2: Tensor, same: list[bool], margin: float) -> Tensor:
    terms = []
    for i, y in enumerate(same):
        d = distance(x1[i], x2[i])
        terms.append(d**2 if y else (margin - d).clamp(min=0) ** 2)
    return mean(terms)


def alignment(prediction: Tensor, target: Tensor) -> Tensor:
    return mean([2 - 2 * sim(p, t.detach()) for p, t in zip(prediction, target, strict=True)])


N, D, K, M = 6, 5, 7, 4
LABELS = [0, 1, 0, 2, 1, 0]  # label 2 has no second row
SAME = [True, False, True, False, False, True]
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]


def _cases() -> dict[str, Case]:
    labels, same = torch.tensor(LABELS), torch.tensor(SAME)
    nd, t = (N, D), 0.3
    return {
        "clip": (clip, lambda x, y, s: losses.clip_loss(x, y, scale=s), [nd, nd, ()]),
        "siglip": (
            siglip,
            lambda x, y, s, b: losses.siglip_loss(x, y, scale=s, bias=b),
            [nd, nd, (), ()],
        ),
        "nt_xent": (
            lambda x, y: nt_xent(x, y, t),
            lambda x, y: losses.nt_xent_loss(x, y, temperature=t),
            [nd, nd],
        ),
        "info_nce": (
            lambda x, y: info_nce(x, y, t),
            lambda x, y: losses.info_nce_loss(x, y, temperature=t),
            [nd, nd],
        ),
        "info_nce queue": (
            lambda x, y, k: info_nce_queue(x, y, k, t),
            lambda x, y, k: losses.info_nce_loss(x, y, negatives=k, temperature=t),
            [nd, nd, (K, D)],
        ),
        "sup_con": (
            lambda z: sup_con(z, LABELS, t),
            lambda z: losses.sup_con_loss(z, labels, temperature=t),
            [nd],
        ),
        "nce": (
            lambda q, p, k, z: nce(q, p, k, z, t, 50),
            lambda q, p, k, z: losses.nce_loss(q, p, k, temperature=t, log_z=z, num_noise_population=50),
            [nd, nd, (N, M, D), ()],
        ),
        "logistic": (
            lambda u, v, k: logistic(u, v, k, 1.0),
            lambda u, v, k: losses.logistic_loss(u, v, k),
            [nd, nd, (N, M, D)],
        ),
        "logistic shared": (
            lambda u, v, k: logistic(u, v, k, 2.5),
            lambda u, v, k: losses.logistic_loss(u, v, k, negative_weight=2.5),
            [nd, nd, (M, D)],
        ),
        "logistic unweighted": (
            lambda u, v, k: logistic(u, v, k, 0.0),
            lambda u, v, k: losses.logistic_loss(u, v, k, negative_weight=0.0),
            [nd, nd, (M, D)],
        ),
        "triplet": (
            lambda a, p, n: triplet(a, p, n, 0.5),
            lambda a, p, n: losses.triplet_loss(a, p, n, margin=0.5),
            [nd, nd, nd],
        ),
        "triplet cosine": (
            lambda a, p, n: triplet_cosine(a, p, n, 0.5),
            lambda a, p, n: losses.triplet_loss(a, p, n, margin=0.5, distance="cosine"),
            [nd, nd, nd],
        ),
        "pair": (
            lambda a, b: pair(a, b, SAME, 4.0),
            lambda a, b: losses.pair_loss(a, b, same, margin=4.0),
            [nd, nd],
        ),
        "alignment": (alignment, losses.alignment_loss, [nd, nd]),
    }


CASES = _cases()


def _inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(11)
    made = [torch.randn(s) if s else torch.rand(()) * 3 + 1 for s in shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_a_float64_loop(name: str) -> None:
    naive, ours, shapes = CASES[name]
    inputs = _inputs(shapes, torch.float64)
    expected, got = naive(*inputs), ours(*inputs)
    assert got.shape == ()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(_gradients(got, inputs), _gradients(expected, inputs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_narrow_inputs_lose_only_their_own_rounding(name: str, dtype: torch.dtype) -> None:
    _, ours, shapes = CASES[name]
    inputs = _inputs(shapes, dtype)
    got = ours(*inputs)
    assert got.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = ours(*wide)
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)
    eps = torch.finfo(dtype).eps
    for g, e in zip(_gradients(got, inputs), _gradients(expected, wide), strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=2 * eps, atol=max(2e-6, eps * float(e.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name: str) -> None:
    _, ours, shapes = CASES[name]
    inputs = _inputs(shapes, torch.float32)
    expected = ours(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours(*inputs)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_non_contiguous_inputs(name: str) -> None:
    _, ours, shapes = CASES[name]
    inputs = _inputs(shapes, torch.float64)
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    torch.testing.assert_close(ours(*strided), ours(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    _, ours, shapes = CASES[name]
    inputs = _inputs(shapes, torch.float64)
    if name == "alignment":  # the target has no gradient on purpose, finite differences would see one
        inputs[1] = inputs[1].detach()
    assert torch.autograd.gradcheck(ours, inputs)


def test_public_names() -> None:
    assert sorted(losses.__all__) == [
        "ContrastOutput",
        "alignment",
        "alignment_loss",
        "cached_backward",
        "clip_loss",
        "contrast",
        "info_nce_loss",
        "logistic_loss",
        "mutual_information_bound",
        "nce_loss",
        "nt_xent_loss",
        "pair_loss",
        "siglip_loss",
        "similarity",
        "sup_con_loss",
        "triplet_loss",
        "uniformity",
    ]
