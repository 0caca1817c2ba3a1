"""`ZeroShotClassifier`: classes that are named, not trained.

Each label is put into every prompt template, the embeddings are averaged and renormalised, and a picture's
cosine to each becomes a probability in the way the model was trained: softmax over the labels (CLIP), or a
sigmoid for each label alone (SigLIP).

    softmax:   p = softmax_j(scale · cos_j)            sigmoid:   p_j = σ(scale · cos_j + bias)

A softmax model asked for independent labels has no bias to compare with; it compares with the template
without a label: p_j = σ(scale · (cos_j − cos_nothing)).

Shapes: n pictures, C labels, T templates, D embedding dimension.

References: Radford et al. 2021, section 3.1.4; Zhai et al. 2023 (SigLIP).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.embedder import Embedder, check_texts
from clipkit.errors import InputError
from clipkit.images import ImageInput
from clipkit.models import DualEncoder

MAX_LABELS = 1000
MAX_TEMPLATES = 100
DEFAULT_TEMPLATES = ("a photo of {}",)


class ZeroShotClassifier:
    """Scores pictures against labels given in words.

    Args:
        embedder: An `Embedder`, a model, or what `load_model` takes.
        labels: 1 to 1,000 non-empty strings.
        templates: 1 to 100 strings that hold `{}` exactly once, where the label goes.

    Raises:
        InputError: Labels or templates are not as above.
    """

    def __init__(
        self,
        embedder: Embedder | DualEncoder | str | Path,
        labels: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ) -> None:
        check_labels(labels)
        check_templates(templates)
        self.embedder = embedder if isinstance(embedder, Embedder) else Embedder(embedder)
        self.labels = list(labels)
        self.templates = list(templates)
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        prompts_CTD = self.embedder.texts(prompts).reshape(len(labels), len(templates), -1)
        self.label_CD = _mean_direction(prompts_CTD)
        self._nothing_1D: np.ndarray | None = None

    def probabilities(self, images: Sequence[ImageInput], *, multi_label: bool = False) -> np.ndarray:
        """The probability of each label for each picture, float64 (n, C).

        Args:
            images: What `Embedder.images` takes.
            multi_label: Score each label alone, so that a row need not sum to 1.
        """
        return self.score(self.embedder.images(images), multi_label=multi_label)

    def score(self, image_ND: np.ndarray, *, multi_label: bool = False) -> np.ndarray:
        """As `probabilities`, for unit vectors (n, D) that `Embedder.images` has given."""
        similarities_NC = self.similarities(image_ND)
        model = self.embedder.model
        scale = float(model.scale.detach())
        if model.scoring == "softmax" and not multi_label:
            return _softmax(scale * similarities_NC)
        if model.bias is None:
            nothing_N1 = np.asarray(image_ND, dtype=np.float64) @ self._nothing().T
            return _sigmoid(scale * (similarities_NC - nothing_N1))
        return _sigmoid(scale * similarities_NC + float(model.bias.detach()))

    def similarities(self, image_ND: np.ndarray) -> np.ndarray:
        """Cosines of pictures and labels, float64 (n, C). Raises: InputError on another shape."""
        image_ND = np.asarray(image_ND, dtype=np.float64)
        if image_ND.ndim != 2 or image_ND.shape[1] != self.embedder.dim:
            raise InputError(
                f"expected embeddings of shape (n, {self.embedder.dim}), got {image_ND.shape}",
                hint="they must come from the same model",
            )
        return image_ND @ self.label_CD.T

    def classify(
        self, images: Sequence[ImageInput], top_k: int | None = None, multi_label: bool = False
    ) -> list[list[dict[str, Any]]]:
        """For each picture its labels, best first.

        Args:
            images: What `Embedder.images` takes.
            top_k: Keep only that many labels; None keeps all.
            multi_label: Score each label alone.

        Returns:
            Per picture a list of `{"label", "score", "similarity", "index"}`; `score` is the probability,
            `similarity` the cosine, `index` the label's position in `labels`.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}")
        image_ND = self.embedder.images(images)
        scores_NC = self.score(image_ND, multi_label=multi_label)
        similarities_NC = self.similarities(image_ND)
        return [
            [
                {
                    "label": self.labels[index],
                    "score": float(scores_C[index]),
                    "similarity": float(similarities_C[index]),
                    "index": int(index),
                }
                for index in np.argsort(-similarities_C, kind="stable")[:top_k]
            ]
            for scores_C, similarities_C in zip(scores_NC, similarities_NC, strict=True)
        ]

    def _nothing(self) -> np.ndarray:
        """The direction of the templates with no label in them, float64 (1, D)."""
        if self._nothing_1D is None:
            prompts = [template.replace("{}", "").strip() for template in self.templates]
            prompts_TD = self.embedder.embed_ids(self.embedder.model.tokenize(prompts))
            self._nothing_1D = _mean_direction(prompts_TD[None])
        return self._nothing_1D


def check_labels(labels: Sequence[str]) -> None:
    """Refuse a label list that is empty, too long, or holds an empty label. Raises: InputError."""
    check_texts(labels, "label")
    if not 1 <= len(labels) <= MAX_LABELS:
        raise InputError(f"expected 1 to {MAX_LABELS} labels, got {len(labels)}")


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates without exactly one `{}`. Raises: InputError."""
    check_texts(templates, "template")
    if not 1 <= len(templates) <= MAX_TEMPLATES:
        raise InputError(f"expected 1 to {MAX_TEMPLATES} templates, got {len(templates)}")
    for position, template in enumerate(templates):
        if template.count("{}") != 1:
            raise InputError(
                f"template {position} {template!r} must hold {{}} exactly once, where the label goes",
                hint='for example "a photo of {}"',
            )


def _mean_direction(vectors_CTD: np.ndarray) -> np.ndarray:
    """Unit vectors averaged over templates and scaled to length 1 again, float64 (C, D)."""
    mean_CD = vectors_CTD.astype(np.float64).mean(axis=1)
    return mean_CD / np.maximum(np.linalg.norm(mean_CD, axis=1, keepdims=True), 1e-12)


def _softmax(logits_NC: np.ndarray) -> np.ndarray:
    shifted_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return shifted_NC / shifted_NC.sum(axis=1, keepdims=True)


def _sigmoid(logits_NC: np.ndarray) -> np.ndarray:
    """The logistic function without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits_NC))
