"""Histograms as one picture, drawn with Pillow: no plotting library is needed to look at shards.

Each panel is one quantity. The bars span from its smallest value to its 99th percentile, and the last one
also holds what lies above; a line marks the median.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clipkit.errors import InputError
from clipkit_data.tools.fonts import picture_format, save_picture, text_font

_WIDTH, _HEIGHT, _MARGIN, _BARS = 420, 260, 36, 32
_INK, _PALE, _BAR, _MARK = "#222222", "#d0d0d0", "#4c78a8", "#e45756"


def histograms(values: Mapping[str, np.ndarray], path: str | Path, *, title: str = "") -> None:
    """Write a picture of histograms, three in a row.

    Args:
        values: For each panel its title and finite numbers (N,); a panel may be empty.
        path: Where to write; the suffix (`.png`, `.webp`, `.jpg`) gives the format.
        title: A line above the panels.

    Raises:
        InputError: Another suffix.
    """
    across = min(3, len(values))
    size = (_WIDTH * across, 44 + _HEIGHT * math.ceil(len(values) / across))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 14), title, fill=_INK, font=text_font(20))
    for number, (name, values_N) in enumerate(values.items()):
        row, column = divmod(number, across)
        _panel(draw, column * _WIDTH, 44 + row * _HEIGHT, name, values_N)
    save_picture(sheet, path)


def check_plot(path: str | Path) -> None:
    """Refuse a file that `histograms` could not write, before all samples are read.

    Raises:
        InputError: Another suffix, or a folder where nothing can be written.
    """
    picture_format(path)
    folder = next(above for above in Path(path).absolute().parents if above.exists())
    if Path(path).is_dir():
        raise InputError(f"{path}: is a folder", hint="name a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "is not writable" if folder.is_dir() else "is no folder"
        raise InputError(f"{path}: cannot be written: {folder} {what}", hint="name a file elsewhere")


def _panel(draw: ImageDraw.ImageDraw, x: int, y: int, name: str, values_N: np.ndarray) -> None:
    left, right = x + _MARGIN, x + _WIDTH - _MARGIN
    top, bottom = y + 36, y + _HEIGHT - 36
    draw.text((left, y + 8), name, fill=_INK, font=text_font(16))
    draw.line((left, bottom, right, bottom), fill=_PALE)
    if not len(values_N):
        draw.text((left, top), "none", fill=_INK, font=text_font(14))
        return
    low, high = float(values_N.min()), float(np.quantile(values_N, 0.99, method="higher"))
    counts, edges = np.histogram(np.minimum(values_N, high), bins=_edges(values_N, low, high))

    def place(value: float) -> float:
        return left + (right - left) * (value - edges[0]) / (edges[-1] - edges[0])

    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        if count:
            height = max(1, round((bottom - top) * count / counts.max()))
            draw.rectangle((place(start), bottom - height, place(end) - 1, bottom - 1), fill=_BAR)
    median = min(float(np.median(values_N)), high)
    draw.line((place(median), top - 4, place(median), bottom), fill=_MARK, width=2)
    small = text_font(13)
    draw.text((left, bottom + 6), _number(low), fill=_INK, font=small)
    above = "+" if values_N.max() > high else ""
    draw.text((right, bottom + 6), _number(high) + above, fill=_INK, font=small, anchor="ra")
    draw.text(
        ((left + right) / 2, bottom + 6), f"median {_number(median)}", fill=_MARK, font=small, anchor="ma"
    )


def _edges(values_N: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where the bars begin and end: one bar for each whole number where there are few."""
    if (values_N % 1 == 0).all() and high - low < _BARS:
        return np.arange(int(low), int(high) + 2) - 0.5
    return np.linspace(low, max(high, low + 1e-6), _BARS + 1)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
