"""What is measured of an encoder during training: nothing that must be trained itself.

Neighbours, and the shape of the features. Loaded with every training, so without the libraries of the probes.

Shapes: N samples, D features.
"""

from collections.abc import Sequence
from typing import Any

from clipkit.losses import alignment, uniformity
from clipkit.metrics import embedding_std, knn_accuracy, rank_me
from clipkit.models import Encoder
from clipkit_data.batches.content import Pictures
from clipkit_data.batches.pairs import Pairs
from clipkit_data.batches.reads import content_of
from clipkit_data.pictures.views import ViewsConfig, ViewSpec
from clipkit_training.judge.features import Features, encoded, read_features
from clipkit_training.judge.labels import code_labels

DIGITS = 4
"""Of a figure in a report, after the point."""


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
    """Figures of an encoder in training.

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
    pair = two_of(views, encoder)
    of = {"": encoded(encoder)}
    sides = {str(number): encoded(encoder, (number, spec), seed) for number, spec in enumerate(pair)}
    held = read_features(heldout, of | sides, label)
    figures = geometry(held[""], [held[name] for name in sides]) | {"heldout": len(held[""].labels)}
    if label is not None:
        known = read_features(train, of, label)[""]
        ks = ks or usual_ks(known)
        figures = neighbours(known, held[""], ks, temperature) | figures
        figures["k"] = min(ks[0], len(known.labels))
    return rounded(figures)


def two_of(views: ViewsConfig | None, encoder: Encoder) -> list[ViewSpec]:
    """The first two views, where there are two and samples are pictures."""
    pictures = encoder.modality == "image" and isinstance(content_of(encoder), Pictures)
    return views.each[:2] if views is not None and len(views) > 1 and pictures else []


def usual_ks(train: Features) -> tuple[int]:
    """How many neighbours vote: more than a class has would drown it."""
    return (200,) if len(train.labels) >= 200 * len(set(train.labels)) else (20,)


def neighbours(train: Features, heldout: Features, ks: Sequence[int], temperature: float) -> dict[str, Any]:
    coded = code_labels(train.labels, heldout.labels)
    found = knn_accuracy(
        heldout.x_ND, coded.heldout_N, train.x_ND, coded.train_N, ks=ks, temperature=temperature
    )
    first = f"knn@{min(ks[0], len(coded.train_N))}"
    return {"knn": found[first]} | {name: value for name, value in found.items() if name != first}


def geometry(features: Features, views: Sequence[Features]) -> dict[str, Any]:
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


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(v, DIGITS) if isinstance(v, float) else v for name, v in figures.items()}
