"""Features of labelled samples: an encoder's, and those of the same encoder untrained.

Shards are read and decoded once, however many kinds of features are taken of them.

Shapes: N samples of a batch or of all, D features, S side in pixels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkit.errors import DataError, InputError
from clipkit.models import Encoder
from clipkit.models.build import new_encoder
from clipkit_data.batches.pairs import Pairs
from clipkit_data.pictures.augment import augment
from clipkit_data.pictures.views import ViewSpec
from clipkit_data.records import Record
from clipkit_training.judge.labels import label_text

FeaturesOf = Callable[[Pairs], Tensor]
"""From a batch of N ≥ 1 samples to floats (N, D)."""


@dataclass(frozen=True)
class Features:
    """Features of labelled samples.

    Args:
        x_ND: float32 on the CPU.
        labels: The class of each, as text; "" for all where no label was asked for.
        records: What else is known of each.
        faults: A reason for each sample that was left out.
    """

    x_ND: Tensor
    labels: Sequence[str]
    records: Sequence[Record] = ()
    faults: Sequence[str] = ()


@torch.inference_mode()
def read_features(
    batches: Iterable[Pairs],
    of: Mapping[str, FeaturesOf],
    label: str | None,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Features]:
    """Several kinds of features of the same samples.

    Samples without the label are left out, and counted among the faults.

    Args:
        batches: Decoded samples, for example `EvalBatches(dataset, encoder.preprocess, captions=False)`.
        of: What is taken of each batch, by name.
        label: Metadata field that names the class; None where none is needed.
        advance: Called with the number of samples done after each batch.

    Raises:
        DataError: No sample can be read, or none has the label: then the fields that there are are named.
        InputError: A feature is not a number.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in of}
    labels, records, faults = list[str](), list[Record](), list[str]()
    fields, first = set[str](), ""
    for batch in batches:
        named = [label_text(record.meta.get(label)) if label else "" for record in batch.records]
        keep = [place for place, name in enumerate(named) if name is not None]
        if keep:
            for name, features_of in of.items():
                parts[name].append(features_of(batch).float().cpu()[keep])
        labels += [name for name in named if name is not None]
        records += [batch.records[place] for place in keep]
        faults += [fault.reason for fault in batch.faults] + [f"no {label}"] * (len(named) - len(keep))
        fields.update(*(record.meta for record in batch.records))
        first = first or next((fault.detail for fault in batch.faults), "")
        advance(len(batch.records) + len(batch.faults))
    if not records:
        raise _nothing(label, fields, first)
    found = {name: torch.cat(part) for name, part in parts.items()}
    for name, x_ND in found.items():
        if not bool(x_ND.isfinite().all()):
            raise InputError(f"the features {f'{name!r} ' if name else ''}hold nan or infinite values")
    return {name: Features(x_ND, labels, records, faults) for name, x_ND in found.items()}


def _nothing(label: str | None, fields: set[str], first: str) -> DataError:
    if fields:
        return DataError(
            f"no sample has the field {label!r} with a text, a whole number or a truth value",
            hint=f"there are {', '.join(sorted(fields))}",
        )
    if label and not first:
        return DataError(f"no sample has the field {label!r}: the samples have no metadata")
    return DataError(f"there is no sample to judge on{f'; the first: {first}' if first else ''}")


def encoded(encoder: Encoder, view: tuple[int, ViewSpec] | None = None, seed: int = 0) -> FeaturesOf:
    """What an encoder makes of samples, in eval mode, not normalised.

    Args:
        encoder: It returns to the mode it was in.
        view: Number and spec of a view to make of each picture before.
        seed: Of the view.
    """

    def features_of(batch: Pairs) -> Tensor:
        inputs: Any = batch.images
        if encoder.tokenizer is not None:
            inputs = encoder.trim(encoder.tokenizer.encode(batch.captions))
        inputs = inputs.to(encoder.device)
        if view is not None:
            number, spec = view
            keys = {"epoch_N": np.zeros(len(inputs), dtype=np.int64), "id_N": batch.sample_ids.numpy()}
            inputs = augment(inputs, spec.augment, seed=seed, view=number, size=spec.size, **keys)
        was_training = encoder.training
        encoder.eval()
        try:
            return encoder.encode(inputs)
        finally:
            encoder.train(was_training)

    return features_of


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """The same encoder with new weights, where the first one is."""
    return new_encoder(encoder.config, seed, encoder.tokenizer).to(encoder.device).eval()
