"""Triton kernels on a slab of scores: one takes it into states, one gives dL/ds; neither writes the scores.

A tile of scores lives in registers between the product that makes it and the sums that are left of it. What
remains of a row or column of a tile is its largest score and Σ e^(score − largest): pairs that join without
loss in any order, however large the scores. Nearly every tile holds plain negatives, because no id of its
rows is an id of its columns; the others are listed first, and left to a second launch (LISTED), so that what
few tiles need takes no registers from all. Nothing is added atomically: equal inputs give equal bits.

Shapes: n, c, D = rows, columns, features of the slab; a tile has BLOCK_N rows and BLOCK_C columns.
"""

# Kernels are compiled by Triton, not by Python, whose types say little of them.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

_SPREAD = tl.constexpr(60.0)  # as in `links`: e^-60 is a normal float32
_LOG2E = tl.constexpr(1.4426950408889634)
_NONE = tl.constexpr(float("-inf"))


@triton.jit
def listed_kernel(row_id, column_id, listed, n, c, SQUARE: tl.constexpr, EACH: tl.constexpr):
    """1 for every square of pairs that has equal ids, else 0, to `listed` (squares down, across).

    A program looks at EACH squares, side by side. Ids whose ranges do not meet are not compared.
    """
    down, across = tl.program_id(0), tl.cdiv(c, SQUARE)
    ids = tl.load(row_id + tl.minimum(down * SQUARE + tl.arange(0, SQUARE), n - 1))
    low, high = tl.min(ids, 0), tl.max(ids, 0)
    first = tl.program_id(1) * EACH
    for square in range(first, tl.minimum(first + EACH, across)):
        others = tl.load(column_id + tl.minimum(square * SQUARE + tl.arange(0, SQUARE), c - 1))
        found = ((high >= tl.min(others, 0)) & (tl.max(others, 0) >= low)).to(tl.int32)
        if found > 0:
            found = tl.max(tl.max((ids[:, None] == others[None, :]).to(tl.int32), 1), 0)
        tl.store(listed + down * across + square, found)


@triton.jit
def _is_listed(
    listed, row_block, column_block, n, c,
    SQUARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whether one of the squares that make up a tile is listed."""
    found = False
    if listed is not None:
        down = row_block * (BLOCK_N // SQUARE) + tl.arange(0, BLOCK_N // SQUARE)[:, None]
        across = column_block * (BLOCK_C // SQUARE) + tl.arange(0, BLOCK_C // SQUARE)[None, :]
        known = (down < tl.cdiv(n, SQUARE)) & (across < tl.cdiv(c, SQUARE))
        found = tl.load(listed + down * tl.cdiv(c, SQUARE) + across, mask=known, other=0)
        found = tl.max(tl.max(found, 1), 0) > 0
    return found


@triton.jit
def _place(rows, columns, GROUP: tl.constexpr):
    """This program's tile: down GROUP tiles, then the next column, so that what they read stays in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def _read(x, at, size):
    """Elements of x (size,); 0 past its end."""
    return tl.load(x + at, mask=at < size, other=0)


@triton.jit
def _scaled(tile, q_factor, k_factor, row, column, n, c):
    return tile * _read(q_factor, row, n)[:, None] * _read(k_factor, column, c)[None, :]


@triton.jit
def _scores(
    q, k, q_factor, k_factor, row, column, n, c, q_stride, k_stride,
    D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The scores of a tile, summed in float32; past the ends, something finite."""
    feature = tl.arange(0, BLOCK_D)
    q_at = q + tl.minimum(row, n - 1).to(tl.int64)[:, None] * q_stride + feature[None, :]
    k_at = k + tl.minimum(column, c - 1).to(tl.int64)[None, :] * k_stride + feature[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x, y = tl.load(q_at + start), tl.load(k_at + start)
        else:
            known = feature < D - start
            x = tl.load(q_at + start, mask=known[None, :], other=0.0)
            y = tl.load(k_at + start, mask=known[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return _scaled(total, q_factor, k_factor, row, column, n, c)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2E)


@triton.jit
def _softplus(x):
    """log(1 + e^x), exact to float32: log(1 + t) = 2 artanh(t / (2 + t)), a short series for t ≤ 1."""
    t = _exp(-tl.abs(x))
    r = t / (t + 2.0)
    z = r * r
    series = 1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13))))
    return tl.maximum(x, 0.0) + 2.0 * r * (1.0 + z * (1 / 3 + z * series))


@triton.jit
def _known(high):
    """A maximum that can be subtracted: 0 where there was no score."""
    return tl.where(high == _NONE, 0.0, high)


@triton.jit
def _mass(score, high, AXIS: tl.constexpr, LOGISTIC: tl.constexpr):
    """Σ e^(score − high) along an axis, or Σ softplus(score); 0 for a score of −inf."""
    if LOGISTIC:
        return tl.sum(_softplus(score), AXIS)
    else:
        return tl.sum(_exp(score - tl.expand_dims(_known(high), AXIS)), AXIS)


@triton.jit
def _masses(score, row_high, column_high, LOGISTIC: tl.constexpr):
    """`_mass` of rows and of columns, from one exponential of a score where the maxima are near enough."""
    if LOGISTIC:
        term = _softplus(score)
        rows, columns = tl.sum(term, 1), tl.sum(term, 0)
    else:
        top = tl.max(row_high, 0)
        low = tl.minimum(tl.min(row_high, 0), tl.min(column_high, 0))
        if (low > _NONE) & (low >= top - _SPREAD):
            term = _exp(score - top)
            rows = tl.sum(term, 1) * _exp(top - row_high)
            columns = tl.sum(term, 0) * _exp(top - column_high)
        else:
            rows = _mass(score, row_high, 1, False)
            columns = _mass(score, column_high, 0, False)
    return rows, columns


@triton.jit
def _join(best, mass, new_best, new_mass, LOGISTIC: tl.constexpr):
    """Maxima and masses of two parts."""
    high = tl.maximum(best, new_best)
    if LOGISTIC:
        mass += new_mass
    else:
        mass = mass * _exp(best - _known(high)) + new_mass * _exp(new_best - _known(high))
    return high, mass


@triton.jit
def _of_positives(score, positive, AXIS: tl.constexpr, LOGISTIC: tl.constexpr):
    """Mass, best score, sum of scores and number of the positives along an axis."""
    shown = tl.where(positive, score, _NONE)
    best = tl.max(shown, AXIS)
    if LOGISTIC:
        shown = tl.where(positive, -score, _NONE)
    mass = _mass(shown, best, AXIS, LOGISTIC)
    return mass, best, tl.sum(tl.where(positive, score, 0.0), AXIS), tl.sum(positive.to(tl.float32), AXIS)


@triton.jit
def _write(part, size, at, mass_n, mass_p, best_n, best_p, score_p, count_p, equal):
    """Store to `part` (7, size), in the order of a state but sums for logarithms, and last the equal ids."""
    known, at, step = at < size, part + at, tl.cast(size, tl.int64)
    tl.store(at, mass_n, mask=known)
    tl.store(at + step, mass_p, mask=known)
    tl.store(at + 2 * step, best_n, mask=known)
    tl.store(at + 3 * step, best_p, mask=known)
    tl.store(at + 4 * step, score_p, mask=known)
    tl.store(at + 5 * step, count_p, mask=known)
    tl.store(at + 6 * step, equal, mask=known)


@triton.jit
def states_kernel(
    q, k, q_factor, k_factor, bias, row_id, row_view, column_id, column_view, listed, of_rows, of_columns,
    n, c, q_stride, k_stride,
    D: tl.constexpr, LARGE: tl.constexpr, LOGISTIC: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SQUARE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial results of a block of rows over a share of the blocks of columns, and of these over the rows.

    A program writes to its own places of `of_rows`[share] (8, n) and `of_columns`[block of rows] (7, c) what
    `_write` says and, of rows, the sum of the scores of negatives. LARGE is there to tune large slabs apart.
    """
    row_blocks, column_blocks = tl.cdiv(n, BLOCK_N), tl.cdiv(c, BLOCK_C)
    shares = tl.num_programs(0) // row_blocks
    row_block, share = _place(row_blocks, shares, 64)
    row = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    zero, no = tl.zeros((BLOCK_N,), dtype=tl.float32), tl.zeros((BLOCK_C,), dtype=tl.float32)
    mass_n, mass_p, best_n, best_p = zero, zero, zero + _NONE, zero + _NONE
    score_p, count_p, equal_n, score_n = zero, zero, zero, zero
    for block in range(share * column_blocks // shares, (share + 1) * column_blocks // shares):
        if _is_listed(listed, row_block, block, n, c, SQUARE, BLOCK_N, BLOCK_C) == LISTED:
            column = block * BLOCK_C + tl.arange(0, BLOCK_C)
            score = _scores(
                q, k, q_factor, k_factor, row, column, n, c, q_stride, k_stride,
                D, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            if LOGISTIC:
                score += tl.load(bias)
            known = (row < n)[:, None] & (column < c)[None, :]
            negative = tl.where(known, score, _NONE)
            mass_p_c, best_p_c, score_p_c, count_p_c, equal_c = no, no + _NONE, no, no, no
            if LISTED:
                equal = known & (_read(row_id, row, n)[:, None] == _read(column_id, column, c)[None, :])
                negative = tl.where(equal, _NONE, negative)
                equal_n += tl.sum(equal.to(tl.float32), 1)
                equal_c = tl.sum(equal.to(tl.float32), 0)
                if column_view is not None:
                    others = _read(column_view, column, c)
                    positive = equal & (_read(row_view, row, n)[:, None] != others[None, :])
                    mass, best, total, count = _of_positives(score, positive, 1, LOGISTIC)
                    best_p, mass_p = _join(best_p, mass_p, best, mass, LOGISTIC)
                    score_p += total
                    count_p += count
                    if BOTH:
                        mass_p_c, best_p_c, score_p_c, count_p_c = _of_positives(score, positive, 0, LOGISTIC)
            best = tl.max(negative, 1)
            if BOTH:
                best_n_c = tl.max(negative, 0)
                mass, mass_n_c = _masses(negative, best, best_n_c, LOGISTIC)
                part = of_columns + row_block.to(tl.int64) * 7 * c
                _write(part, c, column, mass_n_c, mass_p_c, best_n_c, best_p_c, score_p_c, count_p_c, equal_c)
            else:
                mass = _mass(negative, best, 1, LOGISTIC)
            best_n, mass_n = _join(best_n, mass_n, best, mass, LOGISTIC)
            score_n += tl.sum(_known(negative), 1)
    part = of_rows + share.to(tl.int64) * 8 * n
    _write(part, n, row, mass_n, mass_p, best_n, best_p, score_p, count_p, equal_n)
    tl.store(part + tl.cast(n, tl.int64) * 7 + row, score_n, mask=row < n)


@triton.jit
def _softmax_slope(score, reference, up, column_reference, column_up, BOTH: tl.constexpr):
    """g_i e^(s − R_i), plus g_j e^(s − R_j): from one exponential where the range of the R allows that."""
    if BOTH:
        top = tl.max(reference, 0)
        low = tl.minimum(tl.min(reference, 0), tl.min(column_reference, 0))
        if low >= top - _SPREAD:
            u, v = up * _exp(top - reference), column_up * _exp(top - column_reference)
            slope = _exp(score - top) * (u[:, None] + v[None, :])
        else:
            slope = _exp(score - reference[:, None]) * up[:, None]
            slope += _exp(score - column_reference[None, :]) * column_up[None, :]
    else:
        slope = _exp(score - reference[:, None]) * up[:, None]
    return slope


@triton.jit
def _positive_slope(score, need, at, size, AXIS: tl.constexpr, LOGISTIC: tl.constexpr, OUT: tl.constexpr):
    """`links.positive_slope` of every pair of a tile, in the rows' or the columns' direction."""
    up = tl.expand_dims(_read(need + 4 * size, at, size), AXIS)
    if LOGISTIC:
        slope = -tl.sigmoid(-score)
    else:
        among = _exp(score - tl.expand_dims(_read(need + size, at, size), AXIS))
        share = tl.expand_dims(_read(need + 2 * size, at, size), AXIS)
        inverse = tl.expand_dims(_read(need + 3 * size, at, size), AXIS)
        slope = -share * among
        if OUT:  # one positive: −σ, where p − σ p − 1 would cancel
            slope = tl.where(inverse == 1.0, -share, among + slope - inverse)
    return slope * up


@triton.jit
def slopes_kernel(
    q, k, q_factor, k_factor, bias, row_id, row_view, column_id, column_view, listed, row_need, column_need,
    out, sums, n, c, q_stride, k_stride,
    D: tl.constexpr, LARGE: tl.constexpr, LOGISTIC: tl.constexpr, BOTH: tl.constexpr, PRECISION: tl.constexpr,
    LISTED: tl.constexpr, SQUARE: tl.constexpr, OUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dL/ds of a tile, times what takes it to raw features, to `out` (n, c); its plain sum to `sums`."""
    row_block, block = _place(tl.cdiv(n, BLOCK_N), tl.cdiv(c, BLOCK_C), 16)
    if _is_listed(listed, row_block, block, n, c, SQUARE, BLOCK_N, BLOCK_C) == LISTED:
        row, column = row_block * BLOCK_N + tl.arange(0, BLOCK_N), block * BLOCK_C + tl.arange(0, BLOCK_C)
        score = _scores(
            q, k, q_factor, k_factor, row, column, n, c, q_stride, k_stride,
            D, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        up = _read(row_need + 4 * n, row, n)
        column_up = up  # for one direction nobody looks at it
        if BOTH:
            column_up = _read(column_need + 4 * c, column, c)
        if LOGISTIC:
            score += tl.load(bias)
            slope = tl.sigmoid(score)
            if BOTH:
                slope *= up[:, None] + column_up[None, :]
            else:
                slope *= up[:, None]
        else:
            reference = _read(row_need, row, n)
            column_reference = reference
            if BOTH:
                column_reference = _read(column_need, column, c)
            slope = _softmax_slope(score, reference, up, column_reference, column_up, BOTH)
        if LISTED:
            equal = _read(row_id, row, n)[:, None] == _read(column_id, column, c)[None, :]
            slope = tl.where(equal, 0.0, slope)
            if column_view is not None:
                other = _read(row_view, row, n)[:, None] != _read(column_view, column, c)[None, :]
                there = _positive_slope(score, row_need, row, n, 1, LOGISTIC, OUT)
                if BOTH:
                    there += _positive_slope(score, column_need, column, c, 0, LOGISTIC, OUT)
                slope = tl.where(equal & other, there, slope)
        known = (row < n)[:, None] & (column < c)[None, :]
        slope = tl.where(known, slope, 0.0)
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(slope, 1), 0))
        slope = _scaled(slope, q_factor, k_factor, row, column, n, c)
        at = row.to(tl.int64)[:, None] * c + column[None, :]
        tl.store(out + at, slope.to(out.dtype.element_ty), mask=known)
