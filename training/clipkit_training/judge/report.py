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

from clipkit.losses import alignment, uniformity
from clipkit.metrics import embedding_std, knn_accuracy, rank_me
from clipkit.models import Encoder
from clipkit_data.batches.content import Pictures
from clipkit_data.batches.pairs import Dataset, EvalBatches, Pairs
from clipkit_data.batches.reads import content_of
from clipkit_data.pictures.views import ViewsConfig, ViewSpec
from clipkit_data.records import group_faults
from clipkit_training.judge.features import Features, FeaturesOf, encoded, raw, read_features, untrained
from clipkit_training.judge.finetune import finetune
from clipkit_training.judge.labels import code_labels
from clipkit_training.judge.linear import logistic_probe
from clipkit_training.judge.svm import FOLDS, svm_accuracy

log = logging.getLogger("clipkit_training")
_DIGITS = 4
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
    pair = _two_of(views, encoder)
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
        figures = _accuracies(known[name], held[name], ks or _usual_ks(known[name]), temperature, seed)
        if name != "raw":
            sides = [held[f"{name}/{number}"] for number in range(len(pair))]
            figures |= _geometry(held[name], sides)
        if encoder.modality == "graph":
            figures |= _svm(known[name], held[name], svm_seeds)
        result |= {name: _rounded(figures)} if name else _rounded(figures)
    result |= _facts(known[""], held[""], ks or _usual_ks(known[""])) | {
        "label": label,
        "alignment_of": "views" if pair else "labels",
    }
    for share in shares:
        tuned = finetune(encoder, train, heldout, label=label, share=share / 100, seed=seed, advance=advance)
        result[f"finetune_{share}pct"] = round(tuned["accuracy"], _DIGITS)
    return result


def report_live(
    encoder: Encoder,
    train: Sequence[Pairs],
    heldout: Sequence[Pairs],
    *,
    label: str | None,
    ks: Sequence[int] = (),
    temperature: float = 0.07,
    views: ViewsConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What is measured during training: nothing that must be trained itself.

    Args:
        encoder: It returns to the mode it was in.
        train: Decoded samples whose labels vote, a few thousand at most: `list(EvalBatches(data,
            preprocess, captions=False, limit=3000))`. Not read where there is no label.
        heldout: Decoded samples to judge on.
        label, ks, temperature, views, seed: As in `report_encoder`; without a label there is no kNN.

    Returns:
        `{"knn"?, "knn@K"?, "k"?, "rankme", "embedding_std", "alignment"?, "uniformity"}`.

    Raises:
        DataError: No sample can be judged.
        InputError: Features are not finite: the encoder diverged.
    """
    pair = _two_of(views, encoder)
    of = {"": encoded(encoder)}
    sides = {str(number): encoded(encoder, (number, spec), seed) for number, spec in enumerate(pair)}
    held = read_features(heldout, of | sides, label)
    figures = _geometry(held[""], [held[name] for name in sides]) | {"heldout": len(held[""].labels)}
    if label is not None:
        known = read_features(train, of, label)[""]
        ks = ks or _usual_ks(known)
        figures = _knn(known, held[""], ks, temperature) | figures
        figures["k"] = min(ks[0], len(known.labels))
    return _rounded(figures)


def _two_of(views: ViewsConfig | None, encoder: Encoder) -> list[ViewSpec]:
    """The first two views, where there are two and samples are pictures."""
    pictures = encoder.modality == "image" and isinstance(content_of(encoder), Pictures)
    return views.each[:2] if views is not None and len(views) > 1 and pictures else []


def _accuracies(
    train: Features, heldout: Features, ks: Sequence[int], temperature: float, seed: int
) -> dict[str, Any]:
    """What neighbours and linear probes make of features."""
    linear = logistic_probe(train, heldout, seed=seed)
    figures = _knn(train, heldout, ks, temperature)
    figures |= {"linear": linear["top1"], "linear_top5": linear["top5"]}
    for name, share in _FEW.items():
        few = logistic_probe(train, heldout, share=share, draws=_DRAWS, seed=seed)
        figures |= {name: few["top1"], f"{name}_std": few["std"]}
    return figures


def _usual_ks(train: Features) -> tuple[int]:
    """How many neighbours vote: more than a class has would drown it."""
    return (200,) if len(train.labels) >= 200 * len(set(train.labels)) else (20,)


def _knn(train: Features, heldout: Features, ks: Sequence[int], temperature: float) -> dict[str, Any]:
    coded = code_labels(train.labels, heldout.labels)
    found = knn_accuracy(
        heldout.x_ND, coded.heldout_N, train.x_ND, coded.train_N, ks=ks, temperature=temperature
    )
    first = f"knn@{min(ks[0], len(coded.train_N))}"
    return {"knn": found[first]} | {name: value for name, value in found.items() if name != first}


def _geometry(features: Features, views: Sequence[Features]) -> dict[str, Any]:
    """What features look like, whatever they are good for."""
    x_ND = features.x_ND
    figures: dict[str, Any] = {"rankme": rank_me(x_ND)}
    if len(x_ND) > 1:
        figures |= {"embedding_std": embedding_std(x_ND), "uniformity": float(uniformity(x_ND))}
    if views:
        figures["alignment"] = float(alignment(views[0].x_ND, views[1].x_ND))
    elif (pairs := same_label_pairs(features.labels))[0]:
        figures["alignment"] = float(alignment(x_ND[pairs[0]], x_ND[pairs[1]]))
    return figures


def same_label_pairs(labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Each sample with the next one of its class, the last with the first; none without a label or alone."""
    of_class: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        if label:
            of_class.setdefault(label, []).append(place)
    several = [places for places in of_class.values() if len(places) > 1]
    first = [place for places in several for place in places]
    return first, [place for places in several for place in (*places[1:], places[0])]


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


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(v, _DIGITS) if isinstance(v, float) else v for name, v in figures.items()}
