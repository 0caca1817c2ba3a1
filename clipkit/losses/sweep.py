"""Two sweeps over the tiles of a problem: one for the states of its rows, one for the gradients.

The first sweep scores every tile once and collects the states of its rows and, for both directions, of its
columns. The second scores the tiles again and takes dL/ds of each to the gradients: 8·N·M·D floating-point
operations in all for the loss in both directions, and no (N, M) matrix. Where all scores together fit a
budget, the first sweep keeps them and the second need not multiply again; the numbers are the same.

Shapes: N = rows, M = columns of both directions, D = features, n, c = rows and columns of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clipkit.losses import fused, links, whole_rows
from clipkit.losses.links import Rule, merge
from clipkit.losses.problem import Candidates, Gradients, Problem, wide
from clipkit.losses.space import FRESH, Space
from clipkit.losses.tiles import Rows, Tile

KEPT_BYTES = 256 << 20  # scores that may be kept for the second sweep
OWN_BYTES = 64 << 20  # features of candidates that each row brings along, widened at a time
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # scores of a tile: what caches hold; what fills a GPU


def _budget(problem: Problem) -> int:
    return TILE_BYTES.get(problem.scale.device.type, 64 << 20)


def _height(problem: Problem, block: int | None) -> int:
    """Rows of a tile. A strip of whole rows has as many as the budget allows."""
    scores = _budget(problem) // problem.scale.element_size()
    if block is not None:
        return block
    if problem.rule.whole_rows:
        return max(1, scores // max(1, problem.width))
    if any(fused.takes(problem, candidates) for candidates in problem.candidates):
        return fused.ROWS
    return int(scores**0.5)


def _width(problem: Problem, candidates: Candidates, height: int, block: int | None) -> int:
    """Columns of a tile."""
    if block is not None:
        return block
    if fused.takes(problem, candidates):
        return fused.columns_at_once(_budget(problem), problem.rows.features.dtype)
    return max(1, _budget(problem) // problem.scale.element_size() // height)


def _slices(size: int, edge: int) -> list[slice]:
    """Pieces of nearly equal size, none larger than `edge`."""
    count = -(-size // edge)
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


def _tiles(
    problem: Problem, at: slice, height: int, block: int | None
) -> Iterator[tuple[int, Candidates, slice]]:
    for number, candidates in enumerate(problem.candidates):
        width = _width(problem, candidates, height, block)
        if candidates.own:  # these features are as many as the scores times D
            row = (at.stop - at.start) * candidates.features.shape[2] * problem.scale.element_size()
            width = min(width, max(1, OWN_BYTES // max(1, row)))
        for columns in _slices(candidates.width, width):
            yield number, candidates, columns


def forward(
    problem: Problem, block: int | None, kept: list[Tile] | None, of_rows: Tensor, of_columns: Tensor | None
) -> Tensor:
    """The first sweep: take all tiles into the states.

    Args:
        problem: the rows and candidates.
        block: edge of a tile, or None for one that fits the budget.
        kept: a list to put the tiles into, or None to forget them.
        of_rows: states of the rows (8, N), changed in place.
        of_columns: states of all columns (8, M), changed in place, or None.

    Returns:
        The sums (2,) of scaled similarities over positive and over negative pairs.
    """
    sums = torch.zeros(2, dtype=wide(of_rows), device=of_rows.device)
    height, space = _height(problem, block), FRESH if kept is not None or problem.rule.whole_rows else Space()
    for at in _slices(problem.rows.features.shape[0], height):
        rows = Rows(problem, at, space)
        if problem.rule.whole_rows:
            of_rows[:, at], seen = whole_rows.states(rows)
            sums += seen
            continue
        for _, candidates, columns in _tiles(problem, at, height, block):
            where = candidates.at(columns)
            below = None if of_columns is None else of_columns[:, where]
            if fused.takes(problem, candidates):
                mine, others, seen = fused.states(problem, at, candidates, columns, below is not None)
                _merge_into(of_rows[:, at], mine)
                _merge_into(below, others)
            else:
                tile, seen = rows.tile(candidates, columns, rows.features(candidates, columns))
                _take_in(tile, rows.log_weight(where), problem.rule, of_rows[:, at], below, kept is None)
                if kept is not None:
                    kept.append(tile)
            sums += seen
    return sums


def _take_in(
    tile: Tile, log_weight: Tensor | None, rule: Rule, of_rows: Tensor, of_columns: Tensor | None, free: bool
) -> None:
    """Merge a tile into the states of its rows (8, n), and of its columns (8, c), in place."""
    n, c = tile.score.shape
    seen = links.bulk(tile.score, log_weight, rule, of_columns is not None, free)
    for state, new, size, others, index in (
        (of_rows, seen[0], n, c, tile.row),
        (of_columns, seen[1], c, n, tile.column),
    ):
        if state is None or new is None:
            continue
        new[links.COUNT_N] = others
        if index.numel():
            new[links.COUNT_N].index_add_(0, index, torch.ones_like(tile.listed), alpha=-1)
            pick = tile.positive
            new = merge(new, links.positives(tile.listed[pick], index[pick], size, rule))
        _merge_into(state, new)


def _merge_into(state: Tensor | None, new: Tensor | None) -> None:
    if state is not None and new is not None:
        state.copy_(merge(state, new))


def backward(
    problem: Problem, block: int | None, kept: list[Tile] | None, need: tuple[Tensor, Tensor | None],
    into: Gradients,
) -> None:  # fmt: skip
    """The second sweep: add all tiles to the gradients in `into`.

    Args:
        problem: as in `forward`.
        block: as in `forward`.
        kept: what `forward` kept, or None to score again.
        need: what `links.finish` left of the rows (5, N) and of all columns (5, M), times upstream gradients.
        into: where the gradients are summed.
    """
    height, space = _height(problem, block), FRESH if problem.rule.whole_rows else Space()
    again = None if kept is None else iter(kept)
    rounds = problem.rule.link == "softmax" and problem.pairs.log_noise is None
    for at in _slices(problem.rows.features.shape[0], height):
        rows = Rows(problem, at, space)
        if problem.rule.whole_rows:
            whole_rows.push(rows, need[0][:, at], into)
            continue
        for number, candidates, columns in _tiles(problem, at, height, block):
            if fused.takes(problem, candidates):
                parts = need[0][:, at], None if need[1] is None else need[1][:, candidates.at(columns)]
                fused.push(problem, at, number, columns, parts, into)
                continue
            k = rows.features(candidates, columns)
            tile = next(again) if again is not None else None
            if tile is None and rounds and rows.narrow(candidates):
                tile = rows.rounded(candidates, columns, k)
                rounds = tile is not None  # where one tile cannot be rounded, others cannot either
            tile = tile or rows.tile(candidates, columns, k)[0]
            slope = _slope(rows, tile, candidates.at(columns), need, into, again is None)
            rows.push(number, columns, k, slope, into, tile)


def _slope(
    rows: Rows, tile: Tile, where: slice, need: tuple[Tensor, Tensor | None], into: Gradients, free: bool
) -> Tensor:
    """dL/ds of a tile (n, c); those of log-weights and log-noise go to `into`."""
    rule, log_weight = rows.problem.rule, rows.log_weight(where)
    of_rows, of_columns = need[0][:, rows.at], None if need[1] is None else need[1][:, where]
    free = free and into.log_weight is None
    slope = links.bulk_slope(tile.score, log_weight, rule, of_rows, of_columns, free, rows.space)
    if into.log_weight is not None:
        into.add("log_weight", links.weight_slope(tile.score, slope, rule), rows.at, where)
    if tile.row.numel():
        pick = tile.positive
        i, j, score = tile.row[pick], tile.column[pick], tile.listed[pick]
        there = links.positive_slope(score, of_rows[:, i], rule)
        if of_columns is not None:
            there = there + links.positive_slope(score, of_columns[:, j], rule)
        slope[i, j] = there
    if into.log_noise is not None:
        into.add("log_noise", slope.neg(), rows.at, where)
    return slope
