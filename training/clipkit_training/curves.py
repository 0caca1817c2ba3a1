"""Curves of training: figures of one run or several, over steps, samples or seconds, read from their logs.

A figure is a number that `metrics.jsonl` has: "loss" and others of every step, or one of the held-out
samples, which is meant where both have the name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipkit.config import load_yaml
from clipkit.errors import DataError, InputError, NotFoundError
from clipkit_training.figures import new_figure, save_figure
from clipkit_training.log import METRICS, flat
from clipkit_training.run import CONFIG

AXES = {"steps": "steps", "samples": "samples seen", "seconds": "seconds of training"}
"""What curves may run over, and its name below the figure."""

USUAL = ("knn", "text_to_image/recall@1", "rankme", "loss")
"""What is drawn where nothing is named: those of them that the runs have."""

_MOST = 200  # points of a curve of every step: means of neighbours are drawn
Curve = list[tuple[float, float]]


def read_curves(run: Path, over: str = "steps") -> dict[str, Curve]:
    """All curves of a run, by the figure's name; those in a group are "group/name".

    Args:
        run: Its folder.
        over: What is to the right, a key of `AXES`.

    Returns:
        Points (x, value), x rising. A held-out figure stands at the step before it.

    Raises:
        NotFoundError: The folder is not that of a run.
        DataError: The log is damaged, or holds no step.
        InputError: Curves cannot run over that.
    """
    if over not in AXES:
        raise InputError(f"curves cannot run over {over!r}", hint=f"but over {', '.join(AXES)}")
    log = run / METRICS
    if not log.is_file() or not (run / CONFIG).is_file():
        raise NotFoundError(f"{run} is not the folder of a run", hint=f"one has {CONFIG} and {METRICS}")
    batch = int(load_yaml(run / CONFIG)["data"]["batch_size"])
    curves: dict[str, dict[str, Curve]] = {"train": {}, "heldout": {}}
    x = 0.0
    for number, line in enumerate(log.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            if row["kind"] == "train":
                x = {"steps": row["step"], "samples": row["step"] * batch, "seconds": row["seconds"]}[over]
            for name, value in flat(row):
                curves[row["kind"]].setdefault(name, []).append((x, value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{log}, line {number}, is no record of a run: {error!r}") from error
    if not curves["train"]:
        raise DataError(f"{log}: no step is recorded yet")
    return curves["train"] | curves["heldout"]


def draw_curves(
    runs: Mapping[str, Mapping[str, Curve]], figures: Sequence[str], over: str, path: Path
) -> list[Path]:
    """Draw a panel for each figure and a line for each run.

    Args:
        runs: The curves of each run, by the name it is to have.
        figures: Names of figures; none: the `USUAL` ones that there are.
        over: What is to the right, a key of `AXES`.
        path: Where to write, without suffix.

    Returns:
        The files, a PNG and an SVG.

    Raises:
        InputError: No run has such a figure.
    """
    known = {name: None for curves in runs.values() for name in curves}
    for name in figures:
        if name not in known:
            raise InputError(f"no run has {name!r}", hint=f"there are {', '.join(known)}")
    figures = figures or [name for name in USUAL if name in known]
    figure = new_figure(5 * len(figures), 3.8)
    for axes, name in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures, strict=True):
        for number, (run, curves) in enumerate(runs.items()):
            points = _thinned(curves.get(name, []))
            if not points:
                continue
            few = "o" if len(points) < _MOST / 4 else None
            axes.plot(*zip(*points, strict=True), label=run, color=f"C{number}", marker=few, markersize=3)
        axes.set(title=name, xlabel=AXES[over], xlim=(0, None))
        axes.grid(color="#dddddd", linewidth=0.6)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize="small", frameon=False)
    return save_figure(figure, path)


def _thinned(curve: Curve) -> Curve:
    """Means of as many neighbours as leave some two hundred points."""
    size = max(1, len(curve) // _MOST)
    parts = [curve[at : at + size] for at in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
