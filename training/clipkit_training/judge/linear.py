"""Linear probes: how well one linear layer on frozen features tells the classes apart.

Two forms. `logistic_probe` is a convex problem solved to its end: it has one answer, and is what reports
use. `sgd_probe` is the recipe that papers describe, for figures that are held against theirs; `moco_probe`
has MoCo's numbers. Each of them on another metadata field is a transfer probe: features trained for one label
are probed for another by reading them with that `label`, so there is no code of its own for it.

Shapes: N samples, D features, C classes, R = min(N, D).
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from clipkit.errors import InputError
from clipkit.models import seeded
from clipkit_training.judge.features import Features
from clipkit_training.judge.labels import code_labels, stratified

CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_DEFAULT_C = 1.0
_VALIDATION = 0.2
_MAX_ITERATIONS = 200


def logistic_probe(
    train: Features,
    heldout: Features,
    *,
    share: float = 1.0,
    draws: int = 1,
    cs: Sequence[float] = CS,
    seed: int = 0,
) -> dict[str, float]:
    """Multinomial logistic regression on standardised features, with an L2 penalty.

    The features are standardised by mean and standard deviation of the whole training part, labelled or not.
    C is the one of `cs` that does best on a fifth of the labelled samples, which are then used as well; where
    no class has samples to spare for that, C is 1.

    Args:
        train: Features to learn from.
        heldout: Features to be judged on; classes that training lacks are errors.
        share: Of the training labels, the same of each class and at least one: 0.01 and 0.1 are the few-label
            probes.
        draws: How many subsets of that share, drawn by seeds `seed`, `seed + 1`, …
        cs: Inverse strengths of the penalty to choose from.
        seed: Of the draws.

    Returns:
        `{"top1", "top5", "std", "labels"}`: means over the draws, the standard deviation of top1 over them,
        and the number of labelled samples.

    Raises:
        DataError: Fewer than 2 classes in training.
    """
    coded = code_labels(train.labels, heldout.labels)
    train_ND, heldout_ND = _standardised(train.x_ND, heldout.x_ND)
    figures, labels = [], 0
    for draw in range(draws):
        chosen = stratified(coded.train_N, share, seed + draw)
        scores_NC = _logistic(train_ND[chosen], coded.train_N[chosen], heldout_ND, cs, seed + draw)
        figures.append(_top(torch.from_numpy(scores_NC), torch.from_numpy(coded.heldout_N)))
        labels = len(chosen)
    return _means(figures, labels)


def _means(figures: Sequence[tuple[float, float]], labels: int) -> dict[str, float]:
    """Means of top1 and top5 over draws, and the spread of top1."""
    top1, top5 = np.array(figures).T
    means = {"top1": float(top1.mean()), "top5": float(top5.mean()), "std": float(top1.std())}
    return means | {"labels": labels}


def _standardised(train_ND: Tensor, heldout_ND: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both parts as float32 with mean 0 and standard deviation 1 over the training part."""
    scaler = StandardScaler().fit(train_ND.double().numpy())
    train, heldout = (np.asarray(scaler.transform(x_ND.double().numpy())) for x_ND in (train_ND, heldout_ND))
    return train.astype(np.float32), heldout.astype(np.float32)


@threadpool_limits.wrap(limits=1, user_api="blas")  # its many small products wait for each other in threads
def _logistic(
    x_ND: np.ndarray, label_N: np.ndarray, heldout_ND: np.ndarray, cs: Sequence[float], seed: int
) -> np.ndarray:
    """Probabilities (N, C) of held-out samples."""
    if x_ND.shape[1] > len(x_ND):  # the penalty keeps the weights in the span of the rows, which has R axes
        basis_DR = np.linalg.qr(x_ND.T)[0]
        x_ND, heldout_ND = x_ND @ basis_DR, heldout_ND @ basis_DR
    best = _best_c(x_ND, label_N, cs, seed)
    *_, probe = _path(x_ND, label_N, [*(c for c in cs if c < best), best])
    return probe.predict_proba(heldout_ND)


def _best_c(x_ND: np.ndarray, label_N: np.ndarray, cs: Sequence[float], seed: int) -> float:
    """The C that does best on samples that can be spared; the smallest of equals."""
    spare = stratified(label_N, _VALIDATION, seed)
    spare = spare[np.bincount(label_N)[label_N[spare]] > 1]
    if not len(spare) or len(cs) == 1:
        return _DEFAULT_C if len(cs) > 1 else cs[0]
    rest = np.setdiff1d(np.arange(len(label_N)), spare)
    probes = _path(x_ND[rest], label_N[rest], cs)
    return sorted(cs)[int(np.argmax([probe.score(x_ND[spare], label_N[spare]) for probe in probes]))]


def _path(x_ND: np.ndarray, label_N: np.ndarray, cs: Sequence[float]) -> Iterator[LogisticRegression]:
    """The solution for each C, the smallest first, each found from the one before."""
    probe = LogisticRegression(warm_start=True, max_iter=_MAX_ITERATIONS)
    for c in sorted(cs):
        with warnings.catch_warnings():
            # stopping early costs little: it is one more regularisation
            warnings.simplefilter("ignore", ConvergenceWarning)
            # one sample of each class is no sign of a regression here
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            probe.set_params(C=c).fit(x_ND, label_N)
        yield probe


def _top(scores_NC: Tensor, label_N: Tensor) -> tuple[float, float]:
    """Shares of the samples whose class has the best score, and one of the five best."""
    best_N5 = scores_NC.topk(min(5, scores_NC.shape[1]), dim=1).indices
    hit_N5 = best_N5 == label_N[:, None]
    return float(hit_N5[:, 0].double().mean()), float(hit_N5.any(dim=1).double().mean())


def sgd_probe(
    train: Features,
    heldout: Features,
    *,
    batch_norm: bool = False,
    lr: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    epochs: int = 100,
    batch_size: int = 256,
    schedule: Literal["cosine", "steps"] = "cosine",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """A linear layer trained by SGD on frozen features, without augmentation.

    MoCo's probe is lr 30, no weight decay, 100 epochs, a tenth of the rate at 60 and 80 (`schedule="steps"`).
    Such a rate fits features as short as that network's. So that it fits others too, features are shifted to
    mean 0 and scaled by one factor to a root mean square length of 1, which changes nothing that the layer
    could not do itself. With `batch_norm` each feature is standardised over the batch instead, without scale
    and shift, as in He et al. 2022, "Masked autoencoders are scalable vision learners", appendix A.1; the
    rate is then 0.1.

    Args:
        train: Features to learn from.
        heldout: Features to be judged on; classes that training lacks are errors.
        batch_norm: Standardise over the batch.
        lr: Rate for batches of 256, in proportion for others; default 30, or 0.1 with `batch_norm`.
        weight_decay: L2 penalty.
        momentum: Of SGD.
        epochs: Passes over the training part.
        batch_size: Samples of a step.
        schedule: The rate falls as a cosine to 0, or to a tenth at 60 % and at 80 %.
        seed: Of weights and order.
        device: Where to train.

    Returns:
        `{"top1", "top5"}`.

    Raises:
        DataError: Fewer than 2 classes in training.
        InputError: The probe diverged.

    References:
        He et al. 2020, "Momentum contrast for unsupervised visual representation learning", section 4.1.
    """
    coded = code_labels(train.labels, heldout.labels)
    label_N = torch.from_numpy(coded.train_N).to(device)
    train_ND, heldout_ND = train.x_ND.to(device), heldout.x_ND.to(device)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        linear = nn.Linear(train_ND.shape[1], len(coded.classes))
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(train_ND.shape[1], affine=False) if batch_norm else nn.Identity()
    probe = nn.Sequential(norm, linear).to(device)
    if not batch_norm:
        mean_D = train_ND.mean(dim=0)
        length = (train_ND - mean_D).square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
        train_ND, heldout_ND = (train_ND - mean_D) / length, (heldout_ND - mean_D) / length
    batches = -(-len(train_ND) // batch_size)
    rate = (lr if lr is not None else 0.1 if batch_norm else 30.0) * min(batch_size, len(train_ND)) / 256
    optimizer = torch.optim.SGD(probe.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.6 * epochs), int(0.8 * epochs)])
    )
    for _ in range(epochs):
        order_N = torch.randperm(len(train_ND), generator=generator).to(device)
        for rows in order_N.tensor_split(batches):  # of like size: no batch of one sample
            optimizer.zero_grad()
            F.cross_entropy(probe(train_ND[rows]), label_N[rows]).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        scores_NC = probe.eval()(heldout_ND).cpu()
    if not bool(scores_NC.isfinite().all()):
        raise InputError(f"the linear probe diverged at lr {rate:g}", hint="give a lower lr")
    top1, top5 = _top(scores_NC, torch.from_numpy(coded.heldout_N))
    return {"top1": top1, "top5": top5}


def moco_probe(
    train: Features,
    heldout: Features,
    *,
    share: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`sgd_probe` with MoCo's numbers, on shares of the labels as `logistic_probe` takes them.

    Args:
        train, heldout, share, draws: As in `logistic_probe`.
        seed: Of the draws, the weights and the order.
        device: Where to train.

    Returns:
        `{"top1", "top5", "std", "labels"}`, as `logistic_probe`.

    Raises:
        DataError: Fewer than 2 classes in training.
        InputError: The probe diverged.
    """
    label_N = code_labels(train.labels, heldout.labels).train_N
    figures, labels = [], 0
    for draw in range(draws):
        chosen = stratified(label_N, share, seed + draw)
        part = Features(train.x_ND[chosen], np.asarray(train.labels)[chosen].tolist())
        found = sgd_probe(part, heldout, schedule="steps", seed=seed + draw, device=device)
        figures.append((found["top1"], found["top5"]))
        labels = len(chosen)
    return _means(figures, labels)
