"""Labels within limits, and scores by the model's own rule.

The rule is `ZeroShotClassifier`'s; what differs here is that the prompts were embedded beforehand, through
the queue and the cache that all requests share.

N: pictures or queries, M: labels or candidates, D: embedding dimension.
"""

from collections.abc import Sequence

import numpy as np

from clipkit.embedder import Embedder
from clipkit.models import DualEncoder
from clipkit.zero_shot import DEFAULT_TEMPLATES, ZeroShotClassifier
from clipkit_service.problems import invalid, too_many
from clipkit_service.settings import Settings

__all__ = ["DEFAULT_TEMPLATES", "check_labels", "classifier", "probabilities", "prompts"]


def check_labels(
    labels: Sequence[str],
    templates: Sequence[str],
    settings: Settings,
    where: str = "/labels",
    templates_at: str = "/templates",
) -> None:
    """Refuse labels and templates beyond the limits, or without sense. Raises: Problem."""
    if len(labels) > settings.max_labels:
        raise too_many("labels", len(labels), settings.max_labels, where)
    if len(templates) > settings.max_templates:
        raise too_many("templates", len(templates), settings.max_templates, templates_at)
    if len(labels) * len(templates) > settings.max_prompts:
        raise too_many("labels times templates", len(labels) * len(templates), settings.max_prompts, where)
    longest = settings.max_label_chars
    for i, label in enumerate(labels):
        if not label.strip():
            raise invalid("the label is empty", f"{where}/{i}")
        if len(label) > longest:
            raise invalid(f"the label has more than {longest} characters", f"{where}/{i}")
    for i, template in enumerate(templates):
        if template.count("{}") != 1:
            raise invalid("a template holds {} exactly once, where the label goes", f"{templates_at}/{i}")
        if len(template) > longest:
            raise invalid(f"the template has more than {longest} characters", f"{templates_at}/{i}")


def prompts(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every label in every template, label by label."""
    return [template.replace("{}", label) for label in labels for template in templates]


class _Embedded(Embedder):
    """An embedder whose texts were embedded beforehand."""

    def __init__(self, model: DualEncoder, known: dict[str, np.ndarray]) -> None:
        super().__init__(model)
        self._known = known

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of the texts, in their order."""
        return np.stack([self._known[text] for text in texts])


def classifier(
    model: DualEncoder, labels: Sequence[str], templates: Sequence[str], prompts_ND: np.ndarray
) -> ZeroShotClassifier:
    """The classifier of these labels, from the embeddings of their `prompts`."""
    known = dict(zip(prompts(labels, templates), prompts_ND, strict=True))
    return ZeroShotClassifier(_Embedded(model, known), labels, templates)


def probabilities(similarities_M: np.ndarray, scale: float, bias: float, scoring: str) -> np.ndarray:
    """How well each candidate fits, (M,) float64: softmax over the candidates, or a sigmoid for each.

    logit = scale · similarity + bias
    """
    logits_M = scale * similarities_M.astype(np.float64) + bias
    if scoring == "sigmoid":
        return 0.5 * (1 + np.tanh(0.5 * logits_M))
    weights_M = np.exp(logits_M - logits_M.max())
    return weights_M / weights_M.sum()
