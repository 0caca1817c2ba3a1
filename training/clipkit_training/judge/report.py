"""An encoder's report: what its features are worth, beside those it had untrained and the raw content.

A figure alone says little: random features and raw pixels tell many classes apart. So each figure stands
beside theirs, on the same samples, by the same probe.

Shapes: N samples, D features.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from clipkit.models import Encoder
from clipkit_data.batches.pairs import Dataset, EvalBatches
from clipkit_data.batches.reads import content_of
from clipkit_data.pictures.views import ViewsConfig
from clipkit_data.records import group_faults
from clipkit_training.judge.features import Features, FeaturesOf, encoded, read_features, untrained
from clipkit_training.judge.finetune import finetune
from clipkit_training.judge.labels import code_labels
from clipkit_training.judge.linear import logistic_probe, moco_probe
from clipkit_training.judge.live import geometry, neighbours, rounded, two_of, usual_ks
from clipkit_training.judge.overlap import Overlap
from clipkit_training.judge.raw import raw, too_large
from clipkit_training.judge.svm import FOLDS, svm_accuracy

log = logging.getLogger("clipkit_training")
_FEW = {"linear_1pct": 0.01, "linear_10pct": 0.1}
_DRAWS = 3
Probe = Literal["logistic", "sgd"]
"""`logistic_probe`, or `moco_probe`."""


def report_encoder(
    encoder: Encoder,
    train: Dataset,
    heldout: Dataset | None,
    *,
    label: str,
    ks: Sequence[int] = (),
    temperature: float = 0.07,
    probe: Probe = "logistic",
    views: ViewsConfig | None = None,
    baselines: bool = True,
    shares: Sequence[int] = (),
    seeds: Sequence[int] = (0,),
    seed: int = 0,
    workers: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """All figures of an encoder that need a label.

    Args:
        encoder: What is judged, where it is.
        train: What neighbours and probes learn from.
        heldout: What they are judged on; None, for graphs, leaves the SVM and the shape of the features, both
            on `train`.
        label: Metadata field that names the class; another one than it was trained with is a transfer probe.
        ks: Numbers of neighbours; the first is `knn`, others are `knn@K`. By default 200 (Wu et al. 2018),
            or 20 where a class has fewer training samples than that on average.
        temperature: Of the neighbours' vote.
        probe: What the linear figures are of.
        views: Where there are two, alignment is that of two views of each held-out picture; otherwise it is
            that of neighbouring held-out samples of a class.
        baselines: Also judge the encoder with new weights, and the raw content less its mean over `train`.
        shares: Fine-tune on so many per cent of the labels, e.g. (1, 10, 100); this takes minutes.
        seeds: Divisions into folds for the SVM on graphs, and draws of labels to fine-tune on: figures are
            means over them, with `…_std` beside them where there are several.
        seed: Of new weights, draws and views.
        workers: Processes that decode.
        advance: Called with the number of samples done.

    Returns:
        `{"knn", "linear", "linear_top5", "linear_1pct", "linear_10pct", "rankme", "embedding_std",
        "alignment", "uniformity", "alignment_of": "views" or "labels", "label", "k", "temperature", "probe",
        "classes", "train", "heldout", "unseen", "untrained": {…}, "raw": {"knn", "linear", "linear_1pct",
        "linear_10pct"}}`, accuracies in [0, 1]. Those of few labels are means over three draws, with `…_std`
        beside them. Where there are: "knn@K"; "svm" of graphs, by 10-fold cross-validation over both parts,
        each sample once; "finetune_1pct", …; "seeds"; "overlap", the number of held-out samples that `train`
        has, too; "raw_left_out", why there is no "raw"; "faults" by reason. `unseen` held-out samples are of
        classes that training lacks: they count, as errors. `k` is smaller than asked for where training is.

    Raises:
        DataError: The label is missing, or there are fewer than 2 classes.
        InputError: Features are not finite.
    """
    pair = two_of(views, encoder)
    datasets = [train] if heldout is None else [train, heldout]
    no_raw = too_large(encoder, sum(map(len, datasets))) if baselines else None
    kinds = {"": encoder} | ({"untrained": untrained(encoder, seed)} if baselines else {})
    of = {name: encoded(kind) for name, kind in kinds.items()}
    of |= {"raw": raw(encoder)} if baselines and no_raw is None else {}
    views_of: dict[str, FeaturesOf] = {
        f"{name}/{number}": encoded(kind, (number, spec), seed)
        for name, kind in kinds.items()
        for number, spec in enumerate(pair)
    }

    def read(data: Dataset, wanted: Mapping[str, FeaturesOf]) -> dict[str, Features]:
        batches = EvalBatches(data, content_of(encoder), workers=workers, captions=encoder.modality == "text")
        return read_features(batches, wanted, label, advance)

    parts = [read(data, of | views_of if data is datasets[-1] else of) for data in datasets]
    known, judged = parts[0], parts[-1]
    if "raw" in of:  # the cosine of raw content says little while all of it points one way
        mean_D = known["raw"].x_ND.mean(dim=0)
        for part in parts:
            part["raw"] = replace(part["raw"], x_ND=part["raw"].x_ND - mean_D)
    overlap, ks = Overlap(*datasets), ks or usual_ks(known[""])
    few = partial(moco_probe, device=encoder.device) if probe == "sgd" else logistic_probe
    places = overlap.once([part[""].records for part in parts])
    result: dict[str, Any] = {}
    for name in of:
        figures: dict[str, Any] = {}
        if heldout is not None:
            figures |= neighbours(known[name], judged[name], ks, temperature)
            figures |= _linear(few, known[name], judged[name], seed)
        if name != "raw":
            figures |= geometry(judged[name], [judged[f"{name}/{number}"] for number in range(len(pair))])
        if encoder.modality == "graph":
            figures |= _svm([part[name] for part in parts], places, seeds)
        result |= {name: rounded(figures)} if name else rounded(figures)
    result |= {"label": label} | _facts([part[""] for part in parts])
    if heldout is not None:
        shared = _shared(overlap, judged[""])
        result |= {
            "k": min(ks[0], len(known[""].labels)),
            "temperature": temperature,
            "probe": probe,
        } | shared
    result |= {"alignment_of": "views" if pair else "labels"}
    result |= {"seeds": list(seeds)} if shares or encoder.modality == "graph" else {}
    result |= {"raw_left_out": no_raw} if no_raw else {}
    if heldout is None:
        return result
    for share in shares:
        options: dict[str, Any] = {"label": label, "share": share / 100, "advance": advance}
        tuned = [finetune(encoder, train, heldout, seed=each, **options)["accuracy"] for each in seeds]
        result |= rounded(_mean(f"finetune_{share}pct", tuned))
    return result


def _linear(
    probe: Callable[..., dict[str, float]], train: Features, heldout: Features, seed: int
) -> dict[str, float]:
    """What linear probes make of features: with all labels, and with a few."""
    linear = probe(train, heldout, seed=seed)
    figures = {"linear": linear["top1"], "linear_top5": linear["top5"]}
    for name, share in _FEW.items():
        few = probe(train, heldout, share=share, draws=_DRAWS, seed=seed)
        figures |= {name: few["top1"], f"{name}_std": few["std"]}
    return figures


def _svm(parts: Sequence[Features], places: Sequence[int], seeds: Sequence[int]) -> dict[str, float]:
    """Cross-validation over the samples at some places of all parts, each sample once."""
    every = [label for part in parts for label in part.labels]
    labels = [every[place] for place in places]
    if min(Counter(labels).values()) < FOLDS:
        log.warning("no SVM: it needs %d samples of each class", FOLDS)
        return {}
    x_ND = torch.cat([part.x_ND for part in parts])[list(places)]
    return _mean("svm", [svm_accuracy(x_ND, labels, seeds=[seed])["accuracy"] for seed in seeds])


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean over seeds; the spread, too, where there are several."""
    spread = {f"{name}_std": float(np.std(values))} if len(values) > 1 else {}
    return {name: float(np.mean(values))} | spread


def _shared(overlap: Overlap, heldout: Features) -> dict[str, int]:
    """How many held-out samples neighbours and linear probes have learned from; said aloud, too."""
    count, total = overlap.in_training(heldout.records), len(heldout.records)
    if count:
        log.warning(
            "%d of %d held-out samples are in the training data, too: knn and linear know their labels",
            count,
            total,
        )
    return {"overlap": count} if count else {}


def _facts(parts: Sequence[Features]) -> dict[str, Any]:
    """What the figures were measured on."""
    names = [part.labels for part in parts]
    facts: dict[str, Any] = {"classes": len(set(names[0])), "train": len(names[0])}
    if len(parts) > 1:
        facts |= {"heldout": len(names[1]), "unseen": code_labels(*names).unseen}
    faults = group_faults([fault for part in parts for fault in part.faults])
    return facts | ({"faults": faults} if faults else {})
