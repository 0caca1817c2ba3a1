"""What samples are worth without a model: the floor under every figure.

Pictures are their pixels, sentences the counts of their letters, graphs the counts of their degrees.

Shapes: N samples of a batch, V nodes of its graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor

from clipkit.models import Encoder
from clipkit_data.batches.pairs import Pairs
from clipkit_training.judge.features import FeaturesOf

_RAW_SIDE = 64
_LETTERS = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 3), n_features=4096, alternate_sign=False)
_DEGREES = 16
MOST = 1 << 30
"""Bytes that the raw content of all samples may take; the probe on it needs several times as much."""


def raw(encoder: Encoder) -> FeaturesOf:
    """What samples are worth without a model.

    Pictures and clips: pixels as the encoder sees them, at most 64 a side. Sentences: counts of
    two or three letters in a row within words, scaled to length 1. Graphs: numbers of nodes and edges,
    density, and the shares of nodes of degree 0 … 15 and more.
    """
    return {"image": _pixels, "text": _letters, "graph": _degrees}[encoder.modality]


def too_large(encoder: Encoder, samples: int) -> str | None:
    """Why the raw content of so many samples is not measured; None where it is."""
    if encoder.modality == "image":
        side = min(encoder.preprocess.size, _RAW_SIDE)
        width = 3 * side * side * (getattr(encoder.tower, "frames", None) or 1)
    else:
        width = {"text": _LETTERS.n_features, "graph": 3 + _DEGREES}[encoder.modality]
    size = 4 * width * samples
    return f"{samples:,} samples would take {size / (1 << 30):.1f} GiB" if size > MOST else None


def _pixels(batch: Pairs) -> Tensor:
    pictures = batch.images.flatten(0, -4).float() / 255
    if pictures.shape[-1] > _RAW_SIDE:
        pictures = F.interpolate(pictures, size=(_RAW_SIDE, _RAW_SIDE), mode="area")
    return pictures.reshape(len(batch.records), -1)


def _letters(batch: Pairs) -> Tensor:
    return letters(batch.captions)


def letters(texts: Sequence[str]) -> Tensor:
    """Counts of two or three letters in a row within words, scaled to length 1: float32 (N, 4096)."""
    counts: Any = _LETTERS.transform(texts)
    return torch.from_numpy(counts.toarray()).float()


def _degrees(batch: Pairs) -> Tensor:
    graphs = batch.images
    count = len(batch.records)
    degree_V = torch.bincount(graphs.edge_index[0], minlength=len(graphs.batch)).clamp(max=_DEGREES - 1)
    places_V = graphs.batch * _DEGREES + degree_V
    histogram_ND = torch.bincount(places_V, minlength=count * _DEGREES).view(count, _DEGREES).float()
    nodes_N = torch.bincount(graphs.batch, minlength=count).float()
    edges_N = torch.bincount(graphs.batch[graphs.edge_index[0]], minlength=count).float()
    density_N = edges_N / (nodes_N * (nodes_N - 1)).clamp(min=1)
    # of the size of the shares beside them, or the number of nodes would decide alone
    sizes_N3 = torch.stack([nodes_N.log1p() / 10, edges_N.log1p() / 10, density_N], dim=1)
    return torch.cat([sizes_N3, histogram_ND / nodes_N[:, None]], dim=1)
