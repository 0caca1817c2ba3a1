"""Pillow's resizing of pictures, the same to the bit and several times as fast.

Pillow scales in two passes, the rows of pixels first, with weights of 22 bits after the point, and rounds
and clips to 8 bits after each. The order shows at sharp edges and the rounding in every pixel, so both are
kept. What is faster is the layout: both passes are sums of rows, whose bytes the processor multiplies by
the vector, and the first turns the picture for that, a strip of rows at a time and by whole pixels. Numba
compiles it once on a machine, in some seconds.

Source: Pillow 13, `src/libImaging/Resample.c`.

Shapes: H, W height and width in; h, w out; T taps of a pixel; S rows of a strip; L bytes of a row.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
"""The half width of each filter, in pixels of the input, or of the output where that is smaller."""
_BITS = 22  # of a weight, after the point
_HALF = 1 << (_BITS - 1)
_STRIP = 80  # rows of pixels, at most, that lie side by side while their columns are combined
_GIVEN = numba.types.Array(numba.uint32, 2, "A", readonly=True)  # of any strides
_WORDS = numba.uint32[:, ::1]


def resize(pixels_HW4: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """A picture scaled with antialiasing.

    Args:
        pixels_HW4: uint8 (H, W, 4), a pixel's bytes side by side: red, green, blue, and one of no meaning.
        size: Width and height of the output.
        interpolation: "bicubic" or "bilinear".

    Returns:
        uint8 (3, h, w): what `PIL.Image.Image.resize` gives for the picture.
    """
    return _resize(pixels_HW4.view(np.uint32)[..., 0], *size, SUPPORT[interpolation])


def _compiled(signature: Any) -> Callable[..., Any]:
    """Compile a function now, or load it from where an earlier process left it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):  # no folder to keep it in can be written to, or the disk is full
            return numba.njit(signature, nogil=True)(function)

    return decorate


@numba.njit
def _filter(x: float, support: float) -> float:
    """The filter of that support at a distance of x pixels."""
    x = abs(x)
    if support == 1:
        return max(1.0 - x, 0.0)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


@numba.njit
def _weights(old: int, new: int, support: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel of a line of `new` made of `old`: its first tap, the number of taps, their weights."""
    scale = old / new
    stretch = max(scale, 1.0)
    reach = support * stretch
    first, taps = np.empty(new, np.int64), np.empty(new, np.int64)
    weight_nT = np.zeros((new, int(np.ceil(reach)) * 2 + 1), np.int32)
    exact_T = np.empty(weight_nT.shape[1])
    for place in range(new):
        centre = (place + 0.5) * scale
        first[place] = max(int(centre - reach + 0.5), 0)
        taps[place] = min(int(centre + reach + 0.5), old) - first[place]
        total = 0.0
        for tap in range(taps[place]):
            exact_T[tap] = _filter((tap + first[place] - centre + 0.5) * (1.0 / stretch), support)
            total += exact_T[tap]
        for tap in range(taps[place]):
            share = exact_T[tap] / total * (1 << _BITS)
            weight_nT[place, tap] = int(share - 0.5 if share < 0 else share + 0.5)
    return first, taps, weight_nT


@numba.njit
def _combine(rows_HL: np.ndarray, weights: Any, rows_hL: np.ndarray) -> None:
    """Each row of the output as a weighted sum of rows of bytes."""
    first, taps, weight_hT = weights
    sums_L = np.empty(rows_HL.shape[1], np.int32)
    for y in range(len(rows_hL)):
        sums_L[:] = _HALF
        rows_TL, weight_T = rows_HL[first[y] :], weight_hT[y]
        for tap in range(0, taps[y] - 1, 2):  # two at once halve the traffic with the sums
            row_L, next_L = rows_TL[tap], rows_TL[tap + 1]
            weight, next_weight = weight_T[tap], weight_T[tap + 1]
            for at in range(len(sums_L)):
                sums_L[at] += weight * np.int32(row_L[at]) + next_weight * np.int32(next_L[at])
        if taps[y] % 2:
            row_L, weight = rows_TL[taps[y] - 1], weight_T[taps[y] - 1]
            for at in range(len(sums_L)):
                sums_L[at] += weight * np.int32(row_L[at])
        row_L = rows_hL[y]
        for at in range(len(sums_L)):
            row_L[at] = min(max(sums_L[at] >> _BITS, 0), 255)


@_compiled(_WORDS(_WORDS, numba.int64, numba.float64))
def _down(words_HW: np.ndarray, height: int, support: float) -> np.ndarray:
    """Columns scaled: words (h, W)."""
    words_hW = np.empty((height, words_HW.shape[1]), np.uint32)
    weights = _weights(len(words_HW), height, support)
    _combine(words_HW.view(np.uint8), weights, words_hW.view(np.uint8))
    return words_hW


@_compiled(_WORDS(_GIVEN, numba.int64, numba.float64))
def _across(words_HW: np.ndarray, width: int, support: float) -> np.ndarray:
    """Rows scaled: words (H, w). A strip of rows is turned, its columns combined, and turned back."""
    height, old = words_HW.shape
    weights = _weights(old, width, support)
    rows = min(_STRIP, height)
    turned_WS, scaled_wS = np.empty((old, rows), np.uint32), np.empty((width, rows), np.uint32)
    words_Hw = np.empty((height, width), np.uint32)
    for top in range(0, height, rows):
        strip_SW, into_Sw = words_HW[top : top + rows], words_Hw[top : top + rows]
        for row in range(0, len(strip_SW) - 1, 2):  # two at once: neighbours in the turned strip
            for x in range(old):
                turned_WS[x, row] = strip_SW[row, x]
                turned_WS[x, row + 1] = strip_SW[row + 1, x]
        for x in range(old):
            turned_WS[x, len(strip_SW) - 1] = strip_SW[-1, x]
        _combine(turned_WS.view(np.uint8), weights, scaled_wS.view(np.uint8))
        for x in range(width):
            for row in range(len(strip_SW)):
                into_Sw[row, x] = scaled_wS[x, row]
    return words_Hw


@_compiled(numba.uint8[:, :, ::1](_GIVEN, numba.int64, numba.int64, numba.float64))
def _resize(words_HW: np.ndarray, width: int, height: int, support: float) -> np.ndarray:
    old_height, old_width = words_HW.shape
    # Pillow 13 scales columns first where that leaves its second pass much less to do
    if old_height - height > max(0, 2 * (old_width - width)):
        words_hw = _across(_down(words_HW.copy(), height, support), width, support)
    else:
        words_hw = _down(_across(words_HW, width, support), height, support)
    pixels_hL, pixels_3hw = words_hw.view(np.uint8), np.empty((3, height, width), np.uint8)
    for channel in range(3):
        for y in range(height):
            for x in range(width):
                pixels_3hw[channel, y, x] = pixels_hL[y, 4 * x + channel]
    return pixels_3hw
