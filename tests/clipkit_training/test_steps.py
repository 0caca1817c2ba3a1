"""The pair step: equal captions are positives, and ids of captions do not depend on padding."""

from pathlib import Path

import pytest
import torch

from clipkit.errors import ConfigError
from clipkit.losses import clip_loss, contrast
from clipkit.models import DualEncoder, build_model
from clipkit_data.batches.maker import Batch
from clipkit_training.recipe import load_recipe
from clipkit_training.steps import Setting, build_step
from clipkit_training.steps.pairs import PairStep, caption_ids


def batch_of(images: torch.Tensor, ids: torch.Tensor) -> Batch:
    numbers = torch.arange(len(ids))
    return Batch(images=images, ids=ids, sample_ids=numbers, epochs=torch.zeros_like(numbers), step=0)


def test_caption_ids() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 0], [5, 7, 6, 0], [5, 6, 0, 0], [6, 5, 7, 0]])
    found = caption_ids(ids, pad_id=0)
    assert found[0] == found[1]
    assert len(set(found.tolist())) == 4
    longer = torch.nn.functional.pad(ids, (0, 12))
    assert torch.equal(caption_ids(longer, pad_id=0), found)
    assert torch.equal(caption_ids(longer[:, :3], pad_id=0), found)
    padded_with_end = torch.tensor([[5, 6, 9, 9, 9]])
    assert torch.equal(caption_ids(padded_with_end, pad_id=9), caption_ids(padded_with_end[:, :3], pad_id=9))


def test_random_captions_do_not_collide() -> None:
    ids = torch.randint(1, 49408, (20000, 16), generator=torch.Generator().manual_seed(0))
    assert len(caption_ids(ids, pad_id=0).unique()) == len(ids.unique(dim=0))


def test_equal_captions_are_positives(tiny_recipe: Path) -> None:
    model = build_model(load_recipe(str(tiny_recipe)).model.model_copy(update={"scoring": "sigmoid"}), seed=0)
    assert isinstance(model, DualEncoder)
    images = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    ids = model.tokenize(["red circle", "blue square", "red circle", "green cross"])
    loss, metrics = PairStep(model, "logistic", None)(batch_of(images, ids))
    image_ND, text_ND, scale, bias = model(images, ids)
    assert bias is not None
    group = torch.tensor([0, 1, 0, 2])
    expected = contrast(image_ND, text_ND, q_id=group, k_id=group, scale=scale, bias=bias, link="logistic")
    torch.testing.assert_close(loss, expected.loss)
    plain = contrast(image_ND, text_ND, scale=scale, bias=bias, link="logistic")
    assert not torch.isclose(loss, plain.loss)
    assert set(metrics) == {"loss", "accuracy", "positive_similarity", "negative_similarity", "scale"}


@pytest.mark.parametrize(("name", "scoring"), [("clip", "softmax"), ("siglip", "sigmoid")])
def test_a_single_pair_has_no_negatives(tiny_recipe: Path, name: str, scoring: str) -> None:
    config = load_recipe(str(tiny_recipe)).model.model_copy(update={"scoring": scoring})
    with pytest.raises(ConfigError, match="the training data has one sample"):
        build_step(build_model(config, seed=0), name, Setting(samples=1))


def test_without_equal_captions_it_is_clips_loss(tiny_recipe: Path) -> None:
    model = build_model(load_recipe(str(tiny_recipe)).model, seed=0)
    assert isinstance(model, DualEncoder)
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    ids = model.tokenize(["red circle", "blue square", "green cross"])
    loss, _ = PairStep(model, "softmax", None)(batch_of(images, ids))
    image_ND, text_ND, scale, _ = model(images, ids)
    torch.testing.assert_close(loss, clip_loss(image_ND, text_ND, scale=scale))
