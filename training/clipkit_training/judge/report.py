"""An encoder's report: what its features are worth, beside those it had untrained and the raw content.

A figure alone says little: random features and raw pixels tell many classes apart. So each figure stands
beside theirs, on the same samples, by the same probe.

Shapes: N samples, D features.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from clipkit.models import Encoder
from clipkit_data.batches.pairs import Dataset, EvalBatches
from clipkit_data.batches.reads import content_of
from clipkit_data.pictures.views import ViewsConfig
from clipkit_data.records import group_faults
from clipkit_training.judge.features import Features, FeaturesOf, encoded, read_features, untrained
from clipkit_training.judge.finetune import finetune
from clipkit_training.judge.labels import code_labels
from clipkit_training.judge.linear import logistic_probe
from clipkit_training.judge.live import DIGITS, geometry, neighbours, rounded, two_of, usual_ks
from clipkit_training.judge.raw import raw
from clipkit_training.judge.svm import FOLDS, svm_accuracy

log = logging.getLogger("clipkit_training")
_FEW = {"linear_1pct": 0.01, "linear_10pct": 0.1}
_DRAWS = 3


def report_encoder(
    encoder: Encoder,
    train: Dataset,
    heldout: Dataset,
    *,
    label: str,
    ks: Sequence[int] = (),
    temperature: float = 0.07,
    views: ViewsConfig | None = None,
    baselines: bool = True,
    shares: Sequence[int] = (),
    svm_seeds: Sequence[int] = (0,),
    seed: int = 0,
    workers: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """All figures of an encoder that need a label.

    Args:
        encoder: What is judged, where it is.
        train: What neighbours and probes learn from.
        heldout: What they are judged on.
        label: Metadata field that names the class; another one than it was trained with is a transfer probe.
        ks: Numbers of neighbours; the first is `knn`, others are `knn@K`. By default 200 (Wu et al. 2018),
            or 20 where a class has fewer training samples than that on average.
        temperature: Of the neighbours' vote.
        views: Where there are two, alignment is that of two views of each held-out picture; otherwise it is
            that of neighbouring held-out samples of a class.
        baselines: Also judge the encoder with new weights, and the raw content less its mean over `train`.
        shares: Fine-tune on so many per cent of the labels, e.g. (1, 10, 100); this takes minutes.
        svm_seeds: Divisions into folds for the SVM on graphs.
        seed: Of new weights, draws and views.
        workers: Processes that decode.
        advance: Called with the number of samples done.

    Returns:
        `{"knn", "linear", "linear_top5", "linear_1pct", "linear_10pct", "rankme", "embedding_std",
        "alignment", "uniformity", "alignment_of": "views" or "labels", "label", "k", "classes", "train",
        "heldout", "unseen", "untrained": {…}, "raw": {"knn", "linear", "linear_1pct", "linear_10pct"}}`,
        accuracies in [0, 1]. Those of few labels are means over three draws, with `…_std` beside them. Where
        there are: "knn@K"; "svm" and "svm_std" of graphs, by 10-fold cross-validation over both parts;
        "finetune_1pct", …; "faults" by reason. `unseen` held-out samples are of classes that training
        lacks: they count, as errors. `k` is smaller than asked for where training is.

    Raises:
        DataError: The label is missing, or there are fewer than 2 classes.
        InputError: Features are not finite.
    """
    pair = two_of(views, encoder)
    kinds = {"": encoder} | ({"untrained": untrained(encoder, seed)} if baselines else {})
    of = {name: encoded(kind) for name, kind in kinds.items()}
    of |= {"raw": raw(encoder)} if baselines else {}
    views_of: dict[str, FeaturesOf] = {
        f"{name}/{number}": encoded(kind, (number, spec), seed)
        for name, kind in kinds.items()
        for number, spec in enumerate(pair)
    }

    def read(data: Dataset, wanted: Mapping[str, FeaturesOf]) -> dict[str, Features]:
        batches = EvalBatches(data, content_of(encoder), workers=workers, captions=encoder.modality == "text")
        return read_features(batches, wanted, label, advance)

    known, held = read(train, of), read(heldout, of | views_of)
    if baselines:  # the cosine of raw content says little while all of it points one way
        mean_D = known["raw"].x_ND.mean(dim=0)
        for side in (known, held):
            side["raw"] = replace(side["raw"], x_ND=side["raw"].x_ND - mean_D)
    result: dict[str, Any] = {}
    for name in of:
        figures = _accuracies(known[name], held[name], ks or usual_ks(known[name]), temperature, seed)
        if name != "raw":
            sides = [held[f"{name}/{number}"] for number in range(len(pair))]
            figures |= geometry(held[name], sides)
        if encoder.modality == "graph":
            figures |= _svm(known[name], held[name], svm_seeds)
        result |= {name: rounded(figures)} if name else rounded(figures)
    result |= _facts(known[""], held[""], ks or usual_ks(known[""])) | {
        "label": label,
        "alignment_of": "views" if pair else "labels",
    }
    for share in shares:
        tuned = finetune(encoder, train, heldout, label=label, share=share / 100, seed=seed, advance=advance)
        result[f"finetune_{share}pct"] = round(tuned["accuracy"], DIGITS)
    return result


def _accuracies(
    train: Features, heldout: Features, ks: Sequence[int], temperature: float, seed: int
) -> dict[str, Any]:
    """What neighbours and linear probes make of features."""
    linear = logistic_probe(train, heldout, seed=seed)
    figures = neighbours(train, heldout, ks, temperature)
    figures |= {"linear": linear["top1"], "linear_top5": linear["top5"]}
    for name, share in _FEW.items():
        few = logistic_probe(train, heldout, share=share, draws=_DRAWS, seed=seed)
        figures |= {name: few["top1"], f"{name}_std": few["std"]}
    return figures


def _svm(train: Features, heldout: Features, seeds: Sequence[int]) -> dict[str, Any]:
    labels = [*train.labels, *heldout.labels]
    if min(Counter(labels).values()) < FOLDS:
        log.warning("no SVM: it needs %d samples of each class", FOLDS)
        return {}
    found = svm_accuracy(torch.cat([train.x_ND, heldout.x_ND]), labels, seeds=seeds)
    return {"svm": found["accuracy"], "svm_std": found["std"]}


def _facts(train: Features, heldout: Features, ks: Sequence[int]) -> dict[str, Any]:
    """What the figures were measured on."""
    coded = code_labels(train.labels, heldout.labels)
    faults = group_faults([*train.faults, *heldout.faults])
    return {
        "k": min(ks[0], len(train.labels)),
        "classes": len(coded.classes),
        "train": len(train.labels),
        "heldout": len(heldout.labels),
        "unseen": coded.unseen,
    } | ({"faults": faults} if faults else {})
