"""`contrast` against one naive float64 loop that knows every link, denominator and pattern of ids."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipkit.losses import contrast

LINKS = ["softmax", "logistic", "nce", "hinge", "pair", "align"]
fast = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass
class Draw:
    """A random problem, and the arguments that state it to `contrast`."""

    q: Tensor
    k: Tensor
    options: dict[str, Any]
    link: str
    similarity: str = "cosine"
    leaves: list[Tensor] = field(default_factory=list)


def draw(seed: int, link: str, denominator: str = "all", aggregate: str = "out") -> Draw:
    """Shapes, ids, views, negatives, masks and weights from a seed."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    def coin() -> bool:
        return number(0, 1) == 1

    paired = number(0, 3) == 0
    n, d = number(1, 6), number(2, 5)
    m = n if paired else number(1, 7)
    q, k = rows(n, d), rows(m, d)
    scale = (torch.rand((), generator=g, dtype=torch.float64) * 5 + 0.5).requires_grad_()
    if link in ("pair", "align"):
        scale = torch.ones((), dtype=torch.float64)
    leaves = [q, k, scale] if scale.requires_grad else [q, k]
    options: dict[str, Any] = {"scale": scale, "paired": paired, "link": link}
    options["q_id"] = torch.randint(0, 3, (n,), generator=g)
    options["k_id"] = torch.randint(0, 3, (m,), generator=g)
    options["q_view"], options["k_view"] = 0, torch.randint(0, 2, (m,), generator=g)
    width = 1 if paired else m
    if coin():
        size = number(1, 5)
        options["negatives"] = rows(size, d)
        leaves.append(options["negatives"])
        width += size
        if coin():
            options["negative_id"] = torch.randint(0, 3, (size,), generator=g)
    if coin():
        size = number(1, 3)
        options["own_negatives"] = rows(n, size, d)
        leaves.append(options["own_negatives"])
        width += size
        if coin():
            options["own_negative_id"] = torch.randint(0, 3, (n, size), generator=g)
    if coin():
        options["ignore"] = torch.rand(n, width, generator=g) < 0.2
    if number(0, 3) == 0:
        options["positive"] = torch.rand(n, width, generator=g) < 0.4
    if coin():
        options["weight"] = torch.rand(n, generator=g, dtype=torch.float64)
    if link not in ("pair", "align") and (coin() or link == "nce"):
        options["bias"] = rows()
        options["log_noise"] = rows(width)
        leaves += [options["bias"], options["log_noise"]]
    if link in ("softmax", "logistic", "nce") and coin():
        options["log_weight"] = rows(n, width)
        leaves.append(options["log_weight"])
    if link in ("hinge", "pair"):
        options["margin"] = 0.7
    if link == "softmax":
        options |= {"denominator": denominator, "aggregate": aggregate}
    similarity = "cosine"
    if link == "pair":
        similarity = "euclidean"
    elif link != "align":
        similarity = ("cosine", "inner_product", "euclidean")[number(0, 2)]
    return Draw(q, k, options | {"similarity": similarity}, link, similarity, leaves)


def sim(x: Tensor, y: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return (x @ y) / (x @ x).sqrt() / (y @ y).sqrt()
    return x @ y if kind == "inner_product" else -((x - y) @ (x - y)).sqrt()


def candidates(problem: Draw, i: int) -> list[tuple[Tensor, str]]:
    """(vector, "positive" | "negative" | "absent") of row i, in the documented order of columns."""
    o, q_id = problem.options, int(problem.options["q_id"][i])
    found: list[tuple[Tensor, str]] = []
    for j in [i] if o["paired"] else range(len(problem.k)):
        same = int(o["k_id"][j]) == q_id
        itself = same and int(o["k_view"][j]) == 0
        found.append((problem.k[j], "absent" if itself else "positive" if same else "negative"))
    for vectors, ids in (
        (o.get("negatives"), o.get("negative_id")),
        (
            o["own_negatives"][i] if "own_negatives" in o else None,
            o["own_negative_id"][i] if "own_negative_id" in o else None,
        ),
    ):
        for j in range(0 if vectors is None else len(vectors)):
            stale = ids is not None and int(ids[j]) == q_id
            assert vectors is not None
            found.append((vectors[j], "absent" if stale else "negative"))
    for c, (vector, kind) in enumerate(found):
        if "positive" in o and bool(o["positive"][i, c]):
            kind = "positive"
        elif "positive" in o and kind == "positive":
            kind = "negative"
        if "ignore" in o and bool(o["ignore"][i, c]):
            kind = "absent"
        found[c] = (vector, kind)
    return found


def row_loss(problem: Draw, i: int) -> Tensor | None:
    o = problem.options
    positives, negatives = [], []
    for c, (vector, kind) in enumerate(candidates(problem, i)):
        s = o["scale"] * sim(problem.q[i], vector, problem.similarity) + o.get("bias", 0.0)
        if "log_noise" in o:
            s = s - o["log_noise"][c]
        w = o["log_weight"][i, c].exp() if "log_weight" in o else torch.ones((), dtype=torch.float64)
        if kind == "positive":
            positives.append(s)
        elif kind == "negative":
            negatives.append((s, w))
    return REDUCE[problem.link](positives, negatives, o)


def softmax(
    positives: list[Tensor], negatives: list[tuple[Tensor, Tensor]], o: dict[str, Any]
) -> Tensor | None:
    if not positives or (o["denominator"] == "neg" and not negatives):
        return None
    rest = [w * s.exp() for s, w in negatives]
    logs = []
    for s in positives:
        inside = {"all": [p.exp() for p in positives] + rest, "one": [s.exp(), *rest], "neg": rest}
        logs.append(s - torch.stack(inside[o["denominator"]]).sum().log())
    if o["aggregate"] == "out":
        return -torch.stack(logs).mean()
    return -torch.stack(logs).exp().mean().log()


def logistic(
    positives: list[Tensor], negatives: list[tuple[Tensor, Tensor]], o: dict[str, Any]
) -> Tensor | None:
    terms = [(1 + (-s).exp()).log() for s in positives] + [w * (1 + s.exp()).log() for s, w in negatives]
    return torch.stack(terms).sum() if terms else None


def hinge(
    positives: list[Tensor], negatives: list[tuple[Tensor, Tensor]], o: dict[str, Any]
) -> Tensor | None:
    terms = [(o["margin"] - p + s).clamp(min=0) for p in positives for s, _ in negatives]
    return torch.stack(terms).mean() if terms else None


def pair(positives: list[Tensor], negatives: list[tuple[Tensor, Tensor]], o: dict[str, Any]) -> Tensor | None:
    terms = [s**2 for s in positives] + [(o["margin"] + s).clamp(min=0) ** 2 for s, _ in negatives]
    return torch.stack(terms).mean() if terms else None


def align(
    positives: list[Tensor], negatives: list[tuple[Tensor, Tensor]], o: dict[str, Any]
) -> Tensor | None:
    return torch.stack([2 - 2 * s for s in positives]).mean() if positives else None


REDUCE = dict(zip(LINKS, [softmax, logistic, logistic, hinge, pair, align], strict=True))


def check(problem: Draw) -> None:
    rows = [row_loss(problem, i) for i in range(len(problem.q))]
    weights = problem.options.get("weight", torch.ones(len(rows), dtype=torch.float64))
    kept = [(w, r) for w, r in zip(weights, rows, strict=True) if r is not None]
    zero = sum((x.sum() * 0.0 for x in problem.leaves), torch.zeros((), dtype=torch.float64))
    expected = zero
    if kept:
        expected = expected + sum(w * r for w, r in kept) / sum(w for w, _ in kept)
    for block in (None, 1, 2):
        got = contrast(problem.q, problem.k, **problem.options, block=block)
        torch.testing.assert_close(got.loss, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.value, expected.detach(), rtol=1e-9, atol=1e-9)
        assert got.counted.tolist() == [r is not None for r in rows]
        assert got.rows.item() == len(kept)
        assert got.skipped.item() == len(rows) - len(kept)
        for mine, loop in zip(got.per_row, rows, strict=True):
            assert mine.item() == pytest.approx(0.0 if loop is None else loop.item(), rel=1e-9, abs=1e-9)
        ours = torch.autograd.grad(got.loss + 0.0 * zero, problem.leaves, retain_graph=True)
        theirs = torch.autograd.grad(expected, problem.leaves, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@fast
@given(
    seed=st.integers(0, 2**31),
    denominator=st.sampled_from(["all", "one", "neg"]),
    aggregate=st.sampled_from(["out", "in"]),
)
def test_softmax_is_the_loop(seed: int, denominator: str, aggregate: str) -> None:
    check(draw(seed, "softmax", denominator, aggregate))


@fast
@given(seed=st.integers(0, 2**31), link=st.sampled_from(LINKS[1:]))
def test_the_other_links_are_the_loop(seed: int, link: str) -> None:
    check(draw(seed, link))
