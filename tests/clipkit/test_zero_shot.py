"""Zero-shot classification by hand, and refusals; parity with transformers is in test_transformers.py."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.embedder import Embedder
from clipkit.errors import InputError
from clipkit.images import Preprocess
from clipkit.models import DualEncoder, ModelConfig, build_model
from clipkit.zero_shot import ZeroShotClassifier

LABELS = ["cat", "dog", "a very long boat on the river"]


def make(scoring: str) -> DualEncoder:
    config = {
        "image": {"name": "cnn", "widths": [8, 16], "depths": [1, 1]},
        "text": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
        "dim": 6,
        "preprocess": Preprocess(size=16),
        "tokenizer": {"name": "clip", "context_length": 24},
        "scoring": scoring,
    }
    return build_model(ModelConfig.model_validate(config), seed=0).eval()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]


def by_hand(model: DualEncoder, pictures: list[Image.Image], templates: tuple[str, ...]) -> torch.Tensor:
    """Cosines of pictures and labels, float64, in the plainest way."""
    with torch.no_grad():
        image_ND = model.encode_image(model.preprocess(pictures)).double()
        rows = []
        for label in LABELS:
            prompts = [template.replace("{}", label) for template in templates]
            mean = model.encode_text(model.tokenizer.encode(prompts)).double().mean(dim=0)
            rows.append(mean / mean.norm())
    return image_ND @ torch.stack(rows).T


@pytest.mark.parametrize("templates", [("a photo of {}",), ("a photo of {}", "{}!", "一张{}的照片")])
def test_softmax_models_by_hand(templates: tuple[str, ...], pictures: list[Image.Image]) -> None:
    model = make("softmax")
    classifier = ZeroShotClassifier(model, LABELS, templates)
    expected = (model.scale.double() * by_hand(model, pictures, templates)).softmax(dim=1)
    scores = classifier.probabilities(pictures)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(scores.sum(axis=1), 1)


def test_sigmoid_models_by_hand(pictures: list[Image.Image]) -> None:
    model = make("sigmoid")
    assert model.bias is not None
    classifier = ZeroShotClassifier(model, LABELS)
    logits = model.scale.double() * by_hand(model, pictures, ("a photo of {}",)) + model.bias.double()
    for multi_label in (False, True):
        scores = classifier.probabilities(pictures, multi_label=multi_label)
        np.testing.assert_allclose(scores, logits.sigmoid().detach().numpy(), atol=1e-6)


def test_independent_labels_of_a_softmax_model_compare_with_no_label(pictures: list[Image.Image]) -> None:
    model = make("softmax")
    classifier = ZeroShotClassifier(model, LABELS)
    with torch.no_grad():
        image_ND = model.encode_image(model.preprocess(pictures)).double()
        nothing_1D = model.encode_text(model.tokenizer.encode(["a photo of"])).double()
    cosines = by_hand(model, pictures, ("a photo of {}",)) - image_ND @ nothing_1D.T
    expected = (model.scale.double() * cosines).sigmoid().detach().numpy()
    np.testing.assert_allclose(classifier.probabilities(pictures, multi_label=True), expected, atol=1e-5)
    bare = ZeroShotClassifier(model, LABELS, ["{}"])
    assert bare.probabilities(pictures, multi_label=True).shape == (4, 3)


def test_classify_sorts_and_cuts(pictures: list[Image.Image]) -> None:
    classifier = ZeroShotClassifier(Embedder(make("softmax")), LABELS)
    scores = classifier.probabilities(pictures)
    results = classifier.classify(pictures, top_k=2)
    assert [len(result) for result in results] == [2] * 4
    for result, row in zip(results, scores, strict=True):
        assert [item["index"] for item in result] == np.argsort(-row)[:2].tolist()
        for item in result:
            assert item["label"] == LABELS[item["index"]]
            assert item["score"] == pytest.approx(row[item["index"]])
            assert -1 <= item["similarity"] <= 1
    json.dumps(results, allow_nan=False)
    assert len(classifier.classify(pictures[:1])[0]) == 3
    assert classifier.classify([]) == []
    with pytest.raises(InputError, match="top_k"):
        classifier.classify(pictures, top_k=0)


def test_precomputed_embeddings(pictures: list[Image.Image]) -> None:
    embedder = Embedder(make("softmax"))
    classifier = ZeroShotClassifier(embedder, LABELS)
    vectors = embedder.images(pictures)
    np.testing.assert_allclose(classifier.score(vectors), classifier.probabilities(pictures))
    with pytest.raises(InputError, match=r"expected embeddings of shape \(n, 6\)"):
        classifier.score(vectors[:, :5])


def test_a_single_label_has_all_the_probability(pictures: list[Image.Image]) -> None:
    scores = ZeroShotClassifier(make("softmax"), ["cat"]).probabilities(pictures)
    np.testing.assert_allclose(scores, 1)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["{}"], "expected 1 to 1000 labels, got 0"),
        (["x"] * 1001, ["{}"], "got 1001"),
        (["cat", ""], ["{}"], "label 1 is empty"),
        (["cat", 3], ["{}"], "label 1: expected a string, got int"),
        ("cat", ["{}"], "expected a list"),
        (["cat"], [], "expected 1 to 100 templates, got 0"),
        (["cat"], ["a photo"], "exactly once"),
        (["cat"], ["{} and {}"], "exactly once"),
        (["cat"], ["{0}"], "exactly once"),
        (["cat"], "a {}", "expected a list"),
    ],
)
def test_wrong_labels_and_templates(labels: Any, templates: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ZeroShotClassifier(make("softmax"), labels, templates)


def test_labels_are_never_formatted(pictures: list[Image.Image]) -> None:
    classifier = ZeroShotClassifier(make("softmax"), ["{0.__class__}", "{}", "{x"], ["a {} {literal}"])
    assert classifier.probabilities(pictures).shape == (4, 3)
