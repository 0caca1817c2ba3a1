"""Pictures of studies: a heat map of pairs, and bars of heads and widths.

Shapes: R rows, C columns.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipkit_training.figures import new_figure, save_figure


def heat_map(
    values: Mapping[tuple[str, str], float], names: Sequence[str], title: str, path: Path
) -> list[Path]:
    """Write a picture of every pair, and the mean of each row as the last column.

    Args:
        values: Shares in [0, 1] by (row, column); a pair that is missing is left white.
        names: Of the rows, which are also those of the columns.
        title: Above the picture.
        path: Where to write, without suffix.

    Returns:
        The files.
    """
    share_RC = np.array([[values.get((row, column), math.nan) for column in names] for row in names])
    mean_R1 = np.array([[_mean(row)] for row in share_RC])
    percent_RC = 100 * np.concatenate([share_RC, mean_R1], axis=1)
    figure = new_figure(2.2 + 0.8 * len(names), 1.6 + 0.7 * len(names))
    axes = figure.add_subplot()
    picture = axes.imshow(percent_RC, cmap="viridis")
    middle = _middle(percent_RC)
    for (row, column), value in np.ndenumerate(percent_RC):
        if not math.isnan(value):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink)
    axes.axvline(len(names) - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(len(names) + 1), [*names, "average"], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("second")
    axes.set_ylabel("first")
    axes.set_title(title, fontsize="medium", wrap=True)
    figure.colorbar(picture, ax=axes, label="accuracy, %")
    return save_figure(figure, path)


def bars(
    values: Mapping[tuple[str, str], float],
    rows: Sequence[str],
    columns: Sequence[str],
    floor: float | None,
    title: str,
    path: Path,
) -> list[Path]:
    """Write a picture of groups of bars, one group for each column; "" is the group of rows without columns.

    Args:
        values: Shares in [0, 1] by (row, column).
        rows: One colour each.
        columns: One group each.
        floor: A share to mark with a line: what no training gives.
        title: Above the picture.
        path: Where to write, without suffix.

    Returns:
        The files.
    """
    figure = new_figure(3.5 + 1.1 * len(columns), 3.6)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(rows))
    for number, row in enumerate(rows):
        found = [(place, values[row, name]) for place, name in enumerate(columns) if (row, name) in values]
        # a row that has its group for itself stands in the middle
        shift = (
            0 if [columns[place] for place, _ in found] == [""] else (number - (len(rows) - 1) / 2) * width
        )
        heights = [100 * value for _, value in found]
        drawn = axes.bar([place + shift for place, _ in found], heights, width, label=row)
        axes.bar_label(drawn, fmt="%.1f", fontsize="small")
    if floor is not None:
        axes.axhline(100 * floor, color="grey", linestyle="--", linewidth=1, label="untrained")
    axes.set_xticks(range(len(columns)), [name or "features" for name in columns])
    axes.set_xlabel("width of the head's output")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, fontsize="medium", wrap=True)
    figure.legend(fontsize="small", loc="outside right upper")
    return save_figure(figure, path)


def _mean(values_C: np.ndarray) -> float:
    known = values_C[~np.isnan(values_C)]
    return float(known.mean()) if len(known) else math.nan


def _middle(values_RC: np.ndarray) -> float:
    """Between the smallest and the largest: above it colours are light."""
    known = values_RC[~np.isnan(values_RC)]
    return float(known.min() + known.max()) / 2 if len(known) else 0.0
