"""The scores of some rows against some candidates, and dL/ds of these on its way to the gradients.

A `Rows` object holds a slice of the rows of a problem, made ready for products; `tile` gives their scores
against some candidates with the few pairs that are not plain negatives, and `push` takes dL/ds of a tile to
the gradients of rows and candidates. Features are normalised and widened here, a tile at a time, so that no
second copy of them exists.

Shapes: N = rows, D = features, n, c = rows and columns of a tile, m = candidates that each row brings
along, E = pairs in a tile that are not plain negatives.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.hardware import cpu_multiplies_bfloat16
from clipkit.losses.problem import Candidates, Gradients, Problem, part, ready
from clipkit.losses.space import FRESH, Space


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
class Rows:
    """A slice of the rows of a problem, ready for products.

    With a `space` to reuse, candidates' features and scores are overwritten by those of the next tile.
    """

    problem: Problem
    at: slice
    space: Space = FRESH

    @cached_property
    def unit(self) -> Tensor:
        rows = self.problem.rows
        inverse = None if rows.inverse is None else rows.inverse[self.at]
        return ready(rows.features[self.at], inverse, self.problem.scale.dtype)

    @cached_property
    def scaled(self) -> Tensor:
        return self.unit if self.problem.similarity == "euclidean" else self.unit * self.problem.scale

    @cached_property
    def scaled_narrow(self) -> Tensor:
        return self.scaled.bfloat16()

    def features(self, block: Candidates, columns: slice) -> Tensor:
        """Candidates ready for products: (c, D), or (n, m, D)."""
        at = (self.at, columns) if block.own else columns
        inverse = None if block.inverse is None else block.inverse[at]
        return ready(block.features[at], inverse, self.problem.scale.dtype, self.space)

    def narrow(self, block: Candidates) -> bool:
        """Whether products in bfloat16 lose nothing that the features have, and are faster."""
        dtypes, device = {block.features.dtype, self.problem.rows.features.dtype}, self.unit.device.type
        plain = not block.own and self.problem.similarity != "euclidean"
        return plain and dtypes == {torch.bfloat16} and device == "cpu" and cpu_multiplies_bfloat16()

    def rounded(self, block: Candidates, columns: slice, k: Tensor) -> Tile | None:
        """`tile` with the scores of negatives rounded to bfloat16, or None where one is not within ±4.

        Up to there their exponentials are right to 2⁻⁷ at worst, which slopes that are rounded to bfloat16
        next do not feel. Listed pairs are scored exactly.
        """
        narrow = self._take("narrow", (self.scaled.shape[0], k.shape[0]), torch.bfloat16)
        torch.mm(self.scaled_narrow, self._narrowed(k).mT, out=narrow)
        score = self._take("score", tuple(narrow.shape)).copy_(narrow)
        row, column, positive = self._listed(block, columns, block.at(columns))
        if row.numel():
            score[row, column] = 0.0
        if score.numel() and torch.stack(torch.aminmax(score)).abs().max() > 4.0:
            return None
        listed = score.new_zeros(0)
        if row.numel():
            score[row, column] = -torch.inf
            listed = (self.scaled[row] * k[column]).sum(1)
        return Tile(score, row, column, positive, listed)

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
            return torch.bmm(k, self.scaled[:, :, None])[:, :, 0]
        return torch.mm(self.scaled, k.mT, out=self._take("score", (self.scaled.shape[0], k.shape[0])))

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return self.space.take(name, shape, dtype or self.problem.scale.dtype, self.unit)

    def _narrowed(self, k: Tensor) -> Tensor:
        return self._take("narrow features", tuple(k.shape), torch.bfloat16).copy_(k)

    def _distances(self, block: Candidates, k: Tensor) -> Tensor:
        x = self.unit[:, None] if block.own else self.unit
        distance = torch.cdist(x, k, compute_mode="donot_use_mm_for_euclid_dist")
        return distance[:, 0] if block.own else distance

    def _listed(self, block: Candidates, columns: slice, where: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and kind of the pairs that are not plain negatives."""
        p, n, c = self.problem, self.unit.shape[0], columns.stop - columns.start
        rows_id, none = p.rows.id[self.at], p.rows.id.new_zeros(0)
        ids = None if block.id is None else block.id[self.at, columns] if block.own else block.id[columns]
        if not p.pairs.masks and (ids is None or _apart(rows_id, ids)):
            return none, none, none.bool()
        if not p.pairs.masks and ids is not None and not block.own:
            row, column = _equal(rows_id, ids)
            if block.view is None:
                return row, column, torch.zeros_like(row, dtype=torch.bool)
            return row, column, p.rows.view[self.at][row] != block.view[columns][column]
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

    def push(
        self, number: int, columns: slice, k: Tensor, slope: Tensor, into: Gradients, tile: Tile | None = None
    ) -> None:
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
                target += slope[:, :, None] * self.scaled[:, None]
        else:
            self._push_products(block, k, slope, mine, target, tile)

    def _push_products(
        self, block: Candidates, k: Tensor, slope: Tensor, mine: Tensor | None, target: Tensor | None,
        tile: Tile | None,
    ) -> None:  # fmt: skip
        if tile is not None and self.narrow(block):
            self._push_narrow(k, slope, mine, target, tile)
            return
        if mine is not None:
            mine.addmm_(slope, k)
        if target is not None:
            target.addmm_(slope.mT, self.scaled)

    def _push_narrow(
        self, k: Tensor, slope: Tensor, mine: Tensor | None, target: Tensor | None, tile: Tile
    ) -> None:
        """Products in bfloat16, which the gradients are rounded to in the end, with sums in float32.

        Positives, whose few slopes are large, are left out of the products and added exactly.
        """
        row, column = tile.row[tile.positive], tile.column[tile.positive]
        if 0 < row.numel() <= slope.shape[0]:
            there = slope[row, column][:, None]
            slope[row, column] = 0.0
            if mine is not None:
                mine.index_add_(0, row, there * k[column])
            if target is not None:
                target.index_add_(0, column, there * self.scaled[row])
        narrow = self._take("narrow", tuple(slope.shape), torch.bfloat16).copy_(slope)
        for target_xD, left, right_xD in (
            (mine, narrow, None if mine is None else self._narrowed(k)),
            (target, narrow.mT, self.scaled_narrow),
        ):
            if target_xD is not None and right_xD is not None:
                out = self._take("narrow product", tuple(target_xD.shape), torch.bfloat16)
                target_xD += torch.mm(left, right_xD, out=out)

    def _push_distances(
        self, block: Candidates, k: Tensor, slope: Tensor,
        mine: Tensor | None, target: Tensor | None, scale: Tensor | None,
    ) -> None:  # fmt: skip
        x = self.unit[:, None] if block.own else self.unit
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


def _equal(x_n: Tensor, y_c: Tensor) -> tuple[Tensor, Tensor]:
    """Where ids are equal, as two lists (E,): a join of sorted ids, which looks at no n × c pairs."""
    ordered, order = y_c.sort(stable=True)
    first, last = torch.searchsorted(ordered, x_n), torch.searchsorted(ordered, x_n, right=True)
    counts = last - first
    row = torch.arange(x_n.shape[0], device=x_n.device).repeat_interleave(counts)
    before = (counts.cumsum(0) - counts)[row]
    within = torch.arange(row.shape[0], device=x_n.device) - before
    return row, order[first[row] + within]


def _apart(x: Tensor, y: Tensor) -> bool:
    """Whether two sets of ids certainly have nothing in common, where asking does not wait for a device."""
    if x.device.type != "cpu" or x.numel() == 0 or y.numel() == 0:
        return x.numel() == 0 or y.numel() == 0
    return bool(x.max() < y.min()) or bool(y.max() < x.min())
