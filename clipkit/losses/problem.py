"""What is to be solved: rows, blocks of candidates, what the caller says of pairs, gradients to be summed.

Candidates come in blocks: those that all rows share (k, a queue) and those that each row brings along (its
own positive, its own negatives). All columns of all blocks are counted through, in their order. Features
stay as they came; those that enter a product at length 1 have 1 / length beside them, and `ready` and
`through_length` take them there and their gradients back.

Shapes: N = rows, C = candidates of a block, D = features, m = candidates that each row brings along.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipkit.losses.links import Rule
from clipkit.losses.space import FRESH, Space

Similarity = Literal["cosine", "inner_product", "euclidean"]
_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}  # numbers of features that are widened at a time


@dataclass(frozen=True)
class Side:
    """Rows with their identity: features (n, D), ids (n,) int64, views (n,) int64.

    `inverse` (n, 1) is 1 / length of each row, 0 for a row of zeros, where rows are taken at length 1.
    """

    features: Tensor
    id: Tensor
    view: Tensor
    inverse: Tensor | None = None


@dataclass(frozen=True)
class Candidates:
    """One block of candidates.

    Attributes:
        features: (C, D), the same for every row, or (N, m, D), those of each row.
        start: number of their first column among all candidates.
        id: (C,) or (N, m) int64, or None where nobody has one.
        view: the same of views. None: these are never positives, and one with the row's id is left out.
        inverse: 1 / length of each, (C, 1) or (N, m, 1), as in `Side`.
    """

    features: Tensor
    start: int
    id: Tensor | None = None
    view: Tensor | None = None
    inverse: Tensor | None = None

    @property
    def own(self) -> bool:
        return self.features.dim() == 3

    @property
    def width(self) -> int:
        return self.features.shape[1 if self.own else 0]

    @property
    def whole(self) -> slice:
        return slice(0, self.width)

    def at(self, columns: slice) -> slice:
        """The place of columns of this block among all columns."""
        return slice(self.start + columns.start, self.start + columns.stop)


@dataclass(frozen=True)
class Pairs:
    """What the caller says of pairs; each broadcasts to (N, all columns)."""

    positive: Tensor | None = None
    ignore: Tensor | None = None
    log_weight: Tensor | None = None
    log_noise: Tensor | None = None

    @property
    def masks(self) -> bool:
        return self.positive is not None or self.ignore is not None or self.log_weight is not None


@dataclass(frozen=True)
class Problem:
    """Rows and all of their candidates, with the rule to reduce them by. Nothing here carries a gradient."""

    rows: Side
    candidates: tuple[Candidates, ...]
    similarity: Similarity
    scale: Tensor
    bias: Tensor
    rule: Rule
    pairs: Pairs = Pairs()

    @property
    def width(self) -> int:
        return max((block.start + block.width for block in self.candidates), default=0)


@dataclass
class Gradients:
    """Sums of gradients that the tiles add to; None where nobody wants one.

    That of rows is of `Rows.scaled`, those of candidates of the features at length 1.
    """

    rows: Tensor | None  # (N, D)
    candidates: list[Tensor | None]
    scale: Tensor | None = None
    bias: Tensor | None = None
    log_weight: Tensor | None = None
    log_noise: Tensor | None = None

    def add(
        self, name: Literal["log_weight", "log_noise"], tile: Tensor, rows: slice, columns: slice
    ) -> None:
        """Add a tile's (n, c) to something that broadcasts to rows × columns."""
        target = part(getattr(self, name), rows, columns)
        if target is not None:
            target += tile.sum_to_size(target.shape)


def wide(like: Tensor) -> torch.dtype:
    """The widest dtype of a device, for sums."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def part(x: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """A tile's part of something that broadcasts to rows × columns."""
    if x is None:
        return None
    if x.dim() > 0 and x.shape[-1] != 1:
        x = x[..., columns]
    return x if x.dim() < 2 or x.shape[0] == 1 else x[rows]


def _pieces(x: Tensor) -> list[slice]:
    """Rows of features to be worked at together: what caches hold, or what fills a GPU."""
    rows = max(1, _AT_ONCE.get(x.device.type, 1 << 24) // max(1, x[:1].numel()))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def inverse_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / ‖x‖₂ of every row (…, 1), 0 for a row of zeros; squares neither overflow nor underflow."""
    found = [x.new_empty(0, *x.shape[1:-1], 1, dtype=dtype)]
    for at in _pieces(x):
        rows = x[at]
        if rows.dtype == torch.float64 or rows.device.type == "mps":
            largest = rows.abs().amax(-1, keepdim=True)
            largest = largest.masked_fill(largest == 0, 1.0)
            length = torch.linalg.vector_norm(rows / largest, dim=-1, keepdim=True) * largest
        else:  # float64 holds the square of any narrower number
            length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
        inverse = length.reciprocal().clamp(max=torch.finfo(dtype).max)
        found.append(inverse.masked_fill(length == 0, 0.0).to(dtype))
    return torch.cat(found)


def ready(x: Tensor, inverse: Tensor | None, dtype: torch.dtype, space: Space = FRESH) -> Tensor:
    """Features as they enter products: widened, and of length 1 where `inverse` says so."""
    if x.dtype == dtype and inverse is None:
        return x
    out = space.take("features", tuple(x.shape), dtype, x)
    if x.dtype == dtype and inverse is not None:
        return torch.mul(x, inverse, out=out)
    out.copy_(x)
    return out if inverse is None else out.mul_(inverse)


def through_length(gradient: Tensor, x: Tensor, inverse: Tensor | None) -> Tensor:
    """In place: the gradient of features, given that of the same at length 1: (g − x̂⟨g, x̂⟩) / ‖x‖."""
    if inverse is None:
        return gradient
    for at in _pieces(x):
        g, unit = gradient[at], ready(x[at], inverse[at], gradient.dtype)
        g.addcmul_(unit, (g * unit).sum(-1, keepdim=True), value=-1.0).mul_(inverse[at])
    return gradient


def finish(problem: Problem, into: Gradients) -> None:
    """From the gradient of the scaled rows to those of the scale and of the features, in place."""
    if into.rows is None or problem.similarity == "euclidean":
        return
    x, inverse = problem.rows.features, problem.rows.inverse
    for at in _pieces(x):
        if into.scale is not None:
            unit = ready(x[at], None if inverse is None else inverse[at], problem.scale.dtype)
            into.scale += (into.rows[at] * unit).sum()
    through_length(into.rows.mul_(problem.scale), x, inverse)
