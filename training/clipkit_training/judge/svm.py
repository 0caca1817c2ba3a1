"""A support vector machine on whole data sets by cross-validation: how embeddings of graphs are judged.

Small data sets have no split of their own, so every sample is held out once. C is chosen inside each training
part, never on what is held out.

Shapes: N samples, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from joblib import parallel_config
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import SVC

from clipkit.errors import InputError

CS = tuple(10.0**power for power in range(-3, 4))

FOLDS = 10


def svm_accuracy(
    x_ND: Any,
    labels: Sequence[str],
    *,
    folds: int = FOLDS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    cs: Sequence[float] = CS,
) -> dict[str, float]:
    """Mean accuracy of a kernel SVM over stratified folds, and its spread over seeds.

    An RBF kernel of scikit-learn's default width, on features as they are. C is the one of `cs` that does
    best by 5-fold cross-validation within the nine folds that are trained on.

    Args:
        x_ND: (N, D) floating, tensor or numpy array.
        labels: The class of each.
        folds: Parts, each held out once.
        seeds: One division into folds for each.
        cs: Penalties to choose from.

    Returns:
        `{"accuracy", "std"}`: mean and standard deviation over seeds of the mean over folds.

    Raises:
        InputError: Fewer than 2 classes, a class with fewer samples than folds, or a feature that is not
            finite.

    References:
        You et al. 2020, "Graph contrastive learning with augmentations", section 5 and appendix; Sun et al.
        2020, "InfoGraph", section 4.1.
    """
    x_ND, label_N = np.asarray(x_ND, dtype=np.float64), np.asarray(labels)
    classes, counts = np.unique(label_N, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"there are {len(classes)} classes: a probe needs 2 at least")
    if counts.min() < folds:
        rarest = classes[counts.argmin()]
        raise InputError(
            f"class {str(rarest)!r} has {counts.min()} samples, fewer than {folds} folds",
            hint="give more samples or fewer folds",
        )
    if not np.isfinite(x_ND).all():
        raise InputError("the features hold nan or infinite values")
    means = []
    for seed in seeds:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
        right = []
        for train, heldout in parts.split(x_ND, label_N):
            inner = min(5, int(np.unique(label_N[train], return_counts=True)[1].min()))
            search = GridSearchCV(SVC(), {"C": list(cs)}, cv=inner)
            with parallel_config("threading", n_jobs=-1):  # libsvm leaves Python's lock
                search.fit(x_ND[train], label_N[train])
            right.append(search.score(x_ND[heldout], label_N[heldout]))
        means.append(np.mean(right))
    return {"accuracy": float(np.mean(means)), "std": float(np.std(means))}
