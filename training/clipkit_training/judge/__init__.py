"""Judging models: figures on held-out data, during training and after it.

`live_judge` gives what is measured during a run: quick figures, and a few words that say them on one line.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipkit.errors import DataError
from clipkit.models import DualEncoder, Encoder
from clipkit_data.batches.pairs import EvalBatches, Pairs
from clipkit_data.batches.reads import content_of
from clipkit_data.sources import is_streamed, open_dataset
from clipkit_training.evaluate import live_report
from clipkit_training.judge.labels import code_labels, label_text
from clipkit_training.judge.live import report_live
from clipkit_training.recipe import Recipe

log = logging.getLogger("clipkit_training")

LIVE = 3000
"""Samples of a source that an encoder is measured on during training."""
COLLAPSED = 0.05
"""Embeddings that vary less than this, where 1 fills the sphere, are reported as collapsed."""

Judge = Callable[[], tuple[dict[str, Any], str]]
"""Gives figures, and the most telling ones in words."""


def live_judge(recipe: Recipe, model: DualEncoder | Encoder) -> Judge | None:
    """What a recipe wants to have measured during training; None where that is nothing."""
    if not recipe.data.heldout or not recipe.evaluations:
        return None
    return _encoder_judge(recipe, model) if isinstance(model, Encoder) else _pair_judge(recipe, model)


def warn_of_collapse(figures: Mapping[str, Any], what: str) -> None:
    """Say so where figures show that embeddings hardly differ."""
    if figures.get("embedding_std", 1) < COLLAPSED:
        log.warning("%s are nearly one: the run has collapsed", what)


def _pair_judge(recipe: Recipe, model: DualEncoder) -> Judge:
    batches = _read(recipe, model, str(recipe.data.heldout))

    def judge() -> tuple[dict[str, Any], str]:
        figures = live_report(model, batches, recipe.zero_shot_field)
        recall = figures["text_to_image"]
        return figures, f"held-out recall@1 {recall['recall@1']:.3f} @10 {recall['recall@10']:.3f}"

    return judge


def _encoder_judge(recipe: Recipe, model: Encoder) -> Judge:
    data, label = recipe.data, recipe.data.label
    train = [spec for spec in data.sources or [data.train] if not is_streamed(spec)]
    known = [batch for spec in train for batch in _read(recipe, model, spec, LIVE)] if label else []
    heldout = _read(recipe, model, str(data.heldout), LIVE)
    label = label if label and _comparable(known, heldout, label) else None
    views = data.make_views(model.preprocess.size)

    def judge() -> tuple[dict[str, Any], str]:
        figures = report_live(model, known, heldout, label=label, views=views, seed=recipe.seed)
        warn_of_collapse(figures, "the features of the held-out samples")
        knn = f"knn {figures['knn']:.3f} " if "knn" in figures else ""
        return figures, f"held-out {knn}rankme {figures['rankme']:.1f}"

    return judge


def _comparable(known: Sequence[Pairs], heldout: Sequence[Pairs], label: str) -> bool:
    """Whether neighbours can vote on the labels that there are; says why not."""
    try:
        code_labels(_labels(known, "training", label), _labels(heldout, "held-out", label))
    except DataError as error:
        log.warning("nearest neighbours are not measured by %s: %s", label, error)
        return False
    return True


def _labels(parts: Sequence[Pairs], which: str, label: str) -> list[str]:
    """The labels of the samples that have one. Raises: DataError where none has: it names the fields."""
    records = [record for part in parts for record in part.records]
    labels = [name for record in records if (name := label_text(record.meta.get(label))) is not None]
    if records and not labels:
        fields = sorted(set[str]().union(*(record.meta for record in records)))
        raise DataError(
            f"no {which} sample has that field with a text, a whole number or a truth value",
            hint=f"there are {', '.join(fields)}" if fields else "the samples have no metadata",
        )
    return labels


def _read(recipe: Recipe, model: DualEncoder | Encoder, spec: str, limit: int | None = None) -> list[Pairs]:
    """Samples to measure on, decoded."""
    dataset = open_dataset(spec)
    captions = isinstance(model, DualEncoder) or model.modality == "text"
    options = {"workers": recipe.data.workers, "limit": limit, "spread": limit is not None}
    batches = list(EvalBatches(dataset, content_of(model), captions=captions, **options))
    if left_out := sum(len(part.faults) for part in batches):
        log.warning("%s: %d samples cannot be evaluated: see `clipkit shards check`", spec, left_out)
    return batches
