"""Labels as the judges count them: text to numbers, what held-out data has and training lacks, fair shares.

A held-out sample whose class training never showed stays in every figure and is always wrong: to leave it
out would raise the figure without a word. How many there are is in every report (`unseen`).

Shapes: N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipkit.errors import DataError


def label_text(value: Any) -> str | None:
    """A metadata value as a label: a text, a whole number, true or false; None for all else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


@dataclass(frozen=True)
class Coded:
    """Labels as numbers.

    Args:
        train_N: int64, 0 … len(classes) − 1.
        heldout_N: int64; −1 is a class that training lacks.
        classes: The training part's classes, sorted.
    """

    train_N: np.ndarray
    heldout_N: np.ndarray
    classes: list[str]

    @property
    def unseen(self) -> int:
        """Held-out samples of classes that training lacks."""
        return int((self.heldout_N < 0).sum())


def code_labels(train: Sequence[str], heldout: Sequence[str]) -> Coded:
    """Number the classes of the training part.

    Raises:
        DataError: It has fewer than 2 classes, or held-out data has none of them.
    """
    classes = sorted(set(train))
    if len(classes) < 2:
        only = f", only {classes[0]!r}" if classes else ""
        raise DataError(f"the training part has {len(classes)} classes{only}: a probe needs 2 at least")
    number = {name: place for place, name in enumerate(classes)}
    coded = Coded(
        np.array([number[name] for name in train], dtype=np.int64),
        np.array([number.get(name, -1) for name in heldout], dtype=np.int64),
        classes,
    )
    if coded.unseen == len(coded.heldout_N):
        raise DataError(
            "training and held-out data have no class in common: "
            f"{_some(classes)} there, {_some(sorted(set(heldout)))} here"
        )
    return coded


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f", … ({len(names)})" if len(names) > 3 else "") or "none"


def stratified(label_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Places of a share of each class, at least one of each, drawn by a seed.

    Args:
        label_N: Classes, integers.
        share: In (0, 1]; of a class of n samples max(1, round(share · n)) are drawn. Where classes are small
            this is more than the share: 1 % of 60 samples of each class is one of each.
        seed: Of the draw.

    Returns:
        Sorted places, int64.
    """
    assert 0 < share <= 1, share
    generator, drawn = np.random.default_rng(seed), []
    for label in np.unique(label_N):
        places = generator.permutation(np.flatnonzero(label_N == label))
        drawn.append(places[: max(1, round(share * len(places)))])
    return np.sort(np.concatenate(drawn))
