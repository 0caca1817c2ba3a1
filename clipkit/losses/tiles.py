"""A contrastive problem in tiles: the scores of some rows against some candidates, and gradients back.

A `Problem` holds everything after checking. Its candidates come in blocks: those that all rows share (k, a
queue) and those that each row brings along (its own positive, its own negatives). A `Rows` object holds a
slice of the rows, made ready for products; `tile` gives their scores against some candidates with the few
pairs that are not plain negatives, and `push` takes dL/ds of a tile to the gradients of rows and candidates.
Features are normalised and widened here, a tile at a time, so that no second copy of them exists.

Shapes: N = rows, C = candidates of a block, D = features, n, c = rows and columns of a tile, m = candidates
that each row brings along, E = pairs in a tile that are not plain negatives.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from clipkit.losses.links import Rule

Similarity = Literal["cosine", "inner_product", "euclidean"]
_ROWS_AT_ONCE = 4096


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
    both: bool = False

    @property
    def width(self) -> int:
        return max((block.start + block.width for block in self.candidates), default=0)


class Tile(NamedTuple):
    """Scores (n, c) of negatives, with −inf in place of the other pairs, which are listed.

    Attributes:
        score: (n, c).
        row, column: (E,) where the pairs are that are not plain negatives, counted from the tile's corner.
        positive: (E,) bool, which of them are positives; the others are left out.
        listed: (E,) their scores.
    """

    score: Tensor
    row: Tensor
    column: Tensor
    positive: Tensor
    listed: Tensor


@dataclass
class Gradients:
    """Sums of gradients that the tiles add to; None where nobody wants one.

    That of rows is of `Rows.scaled_nD`, those of candidates of the features at length 1.
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


def part(x: Tensor | None, rows: slice, columns: slice) -> Tensor | None:
    """A tile's part of something that broadcasts to rows × columns."""
    if x is None:
        return None
    if x.dim() > 0 and x.shape[-1] != 1:
        x = x[..., columns]
    return x if x.dim() < 2 or x.shape[0] == 1 else x[rows]


def inverse_length(x: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / ‖x‖₂ of every row (…, 1), 0 for a row of zeros; squares neither overflow nor underflow."""
    found = []
    for rows in x.split(_ROWS_AT_ONCE):
        rows = rows.to(dtype)
        largest = rows.abs().amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == 0, 1.0)
        length = torch.linalg.vector_norm(rows / largest, dim=-1, keepdim=True)
        inverse = (length * largest).reciprocal_().clamp_(max=torch.finfo(dtype).max)
        found.append(inverse.masked_fill_(length == 0, 0.0))
    return torch.cat(found)


def ready(x: Tensor, inverse: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Features as they enter products: widened, and of length 1 where `inverse` says so."""
    return x.to(dtype) if inverse is None else x.to(dtype) * inverse


def through_length(gradient: Tensor, x: Tensor, inverse: Tensor | None) -> Tensor:
    """In place: the gradient of features, given that of the same at length 1: (g − x̂⟨g, x̂⟩) / ‖x‖."""
    if inverse is None:
        return gradient
    for g, rows, scale in zip(*(t.split(_ROWS_AT_ONCE) for t in (gradient, x, inverse)), strict=True):
        unit = ready(rows, scale, g.dtype)
        g.addcmul_(unit, (g * unit).sum(-1, keepdim=True), value=-1.0).mul_(scale)
    return gradient


@dataclass
class Rows:
    """A slice of the rows of a problem, ready for products."""

    problem: Problem
    at: slice
    unit_nD: Tensor = field(init=False)
    scaled_nD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        p = self.problem
        inverse = None if p.rows.inverse is None else p.rows.inverse[self.at]
        self.unit_nD = ready(p.rows.features[self.at], inverse, p.scale.dtype)
        self.scaled_nD = self.unit_nD if p.similarity == "euclidean" else self.unit_nD * p.scale

    def features(self, block: Candidates, columns: slice) -> Tensor:
        """Candidates ready for products: (c, D), or (n, m, D)."""
        at = (self.at, columns) if block.own else columns
        inverse = None if block.inverse is None else block.inverse[at]
        return ready(block.features[at], inverse, self.problem.scale.dtype)

    def tile(self, block: Candidates, columns: slice, k: Tensor) -> tuple[Tile, Tensor]:
        """Score these rows against candidates `k` of a block.

        Returns:
            The tile, and the sums (2,) of scaled similarities over positives and over negatives.
        """
        p, where = self.problem, block.at(columns)
        score = self._products(block, k)
        total = score.sum()
        row, column, positive = self._listed(block, columns, where)
        listed = score[row, column]
        sums = torch.stack([listed[positive].sum(), total - listed.sum()])
        if p.rule.link != "softmax":  # a softmax does not see what all scores have in common
            score += p.bias
        noise = part(p.pairs.log_noise, self.at, where)
        if noise is not None:
            score -= noise
        if row.numel():
            listed = score[row, column]
            score[row, column] = -torch.inf
        return Tile(score, row, column, positive, listed), sums

    def log_weight(self, where: slice) -> Tensor | None:
        """Log-weights of the negatives of a tile, broadcasting to it."""
        return part(self.problem.pairs.log_weight, self.at, where)

    def _products(self, block: Candidates, k: Tensor) -> Tensor:
        if self.problem.similarity == "euclidean":
            return self._distances(block, k).mul_(-self.problem.scale)
        if block.own:
            return torch.bmm(k, self.scaled_nD[:, :, None])[:, :, 0]
        return self.scaled_nD @ k.mT

    def _distances(self, block: Candidates, k: Tensor) -> Tensor:
        x = self.unit_nD[:, None] if block.own else self.unit_nD
        distance = torch.cdist(x, k, compute_mode="donot_use_mm_for_euclid_dist")
        return distance[:, 0] if block.own else distance

    def _listed(self, block: Candidates, columns: slice, where: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and kind of the pairs that are not plain negatives."""
        p, n, c = self.problem, self.unit_nD.shape[0], columns.stop - columns.start
        rows_id, none = p.rows.id[self.at], p.rows.id.new_zeros(0)
        ids = None if block.id is None else block.id[self.at, columns] if block.own else block.id[columns]
        if not p.pairs.masks and (ids is None or _apart(rows_id, ids)):
            return none, none, none.bool()
        no = torch.zeros((), dtype=torch.bool, device=rows_id.device).expand(n, c)
        absent = no if ids is None else rows_id[:, None] == ids
        positive = no
        if block.view is not None:
            views = block.view[self.at, columns] if block.own else block.view[columns]
            itself = absent & (p.rows.view[self.at, None] == views)
            positive, absent = absent & ~itself, itself
        explicit, ignore = part(p.pairs.positive, self.at, where), part(p.pairs.ignore, self.at, where)
        if explicit is not None:  # an explicit positive wins over the ids
            positive = explicit.expand(n, c)
            absent = absent & ~positive
        weight = part(p.pairs.log_weight, self.at, where)
        if weight is not None:  # a negative that weighs nothing is none
            absent = absent | ((weight == -torch.inf) & ~positive)
        if ignore is not None:  # an explicit ignore wins over everything
            absent = absent | ignore
            positive = positive & ~ignore
        row, column = (positive | absent).nonzero(as_tuple=True)
        return row, column, positive[row, column]

    def push(self, number: int, columns: slice, k: Tensor, slope: Tensor, into: Gradients) -> None:
        """Add a tile's part, given its dL/ds, to the gradients of these rows and of candidates `k`."""
        block, target = self.problem.candidates[number], into.candidates[number]
        if target is not None:
            target = target[self.at, columns] if block.own else target[columns]
        mine = None if into.rows is None else into.rows[self.at]
        if into.bias is not None and self.problem.rule.link != "softmax":
            into.bias += slope.sum()
        if self.problem.similarity == "euclidean":
            self._push_distances(block, k, slope, mine, target, into.scale)
        elif block.own:
            if mine is not None:
                mine += torch.bmm(slope[:, None], k)[:, 0]
            if target is not None:
                target += slope[:, :, None] * self.scaled_nD[:, None]
        else:
            if mine is not None:
                mine.addmm_(slope, k)
            if target is not None:
                target.addmm_(slope.mT, self.scaled_nD)

    def _push_distances(
        self, block: Candidates, k: Tensor, slope: Tensor,
        mine: Tensor | None, target: Tensor | None, scale: Tensor | None,
    ) -> None:  # fmt: skip
        x = self.unit_nD[:, None] if block.own else self.unit_nD
        distance = self._distances(block, k)
        if scale is not None:
            scale.sub_((slope * distance).sum())
        away = slope * -self.problem.scale
        if block.own:
            distance, away = distance[:, None], away[:, None]
        if mine is not None:
            back = torch.ops.aten._cdist_backward(away, x, k, 2.0, distance)
            mine += back[:, 0] if block.own else back
        if target is not None:
            turned = (away.mT.contiguous(), k.contiguous(), x.contiguous(), 2.0, distance.mT.contiguous())
            target += torch.ops.aten._cdist_backward(*turned)


def finish(problem: Problem, into: Gradients) -> None:
    """From the gradient of the scaled rows to those of the scale and of the features, in place."""
    if into.rows is None or problem.similarity == "euclidean":
        return
    x, inverse = problem.rows.features, problem.rows.inverse
    for start in range(0, x.shape[0], _ROWS_AT_ONCE):
        at = slice(start, start + _ROWS_AT_ONCE)
        if into.scale is not None:
            unit = ready(x[at], None if inverse is None else inverse[at], problem.scale.dtype)
            into.scale += (into.rows[at] * unit).sum()
    through_length(into.rows.mul_(problem.scale), x, inverse)


def _apart(x: Tensor, y: Tensor) -> bool:
    """Whether two sets of ids certainly have nothing in common, where asking does not wait for a device."""
    if x.device.type != "cpu" or x.numel() == 0 or y.numel() == 0:
        return x.numel() == 0 or y.numel() == 0
    return bool(x.max() < y.min()) or bool(y.max() < x.min())
