"""The digits of scikit-learn as shards: 1,797 scans of 8 × 8 pixels.

`clipkit shards digits OUT` writes them in a second, without a download: they come with scikit-learn. A fifth
of each digit's pictures is held out, those whose hash comes first.

References: E. Alpaydin, C. Kaynak 1998, "Cascading classifiers", Kybernetika 34. scikit-learn has the test
set of their "Optical recognition of handwritten digits" in the UCI repository.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from clipkit_data.tools.labelled import Labelled, png, write_splits

HELDOUT = 0.2
_INK = 16  # what scikit-learn's pixels count to


def write_digit_shards(out: Path, *, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Write `OUT/train` and `OUT/heldout`: each picture an 8 × 8 PNG, ink bright on dark.

    Args:
        out: A new folder; it appears whole or not at all.
        progress: Called with 1 after each picture.

    Returns:
        `{"samples": {split: count}, "faults": {}, "out": path}`.
    """
    ink_NP, labels_N = load_digits(return_X_y=True)
    pixels_N88 = np.round(ink_NP.reshape(-1, 8, 8) * (255 / _INK)).astype(np.uint8)
    heldout = held_out(pixels_N88, labels_N)
    splits: dict[str, list[Labelled]] = {"train": [], "heldout": []}
    for place, (pixels_88, label) in enumerate(zip(pixels_N88, labels_N, strict=True)):
        split = "heldout" if place in heldout else "train"
        more = {"index": place, "split": split}
        splits[split].append(Labelled(png(pixels_88), "png", str(label), int(label), more))
    return write_splits(splits, out, progress=progress)


def held_out(pixels_N88: np.ndarray, labels_N: np.ndarray) -> set[int]:
    """The positions that are held out: of each label the fifth whose pixels' SHA-256 comes first.

    Args:
        pixels_N88: uint8 (N, 8, 8).
        labels_N: Integers (N,).
    """
    order = sorted(
        range(len(labels_N)), key=lambda place: hashlib.sha256(pixels_N88[place].tobytes()).digest()
    )
    chosen: set[int] = set()
    for label in np.unique(labels_N):
        own = [place for place in order if labels_N[place] == label]
        chosen.update(own[: round(HELDOUT * len(own))])
    return chosen
