"""What all Steps on two views refuse: other models, other views, a batch of one, runs of unknown length."""

import pytest
import torch
from torch import nn

from clipkit.errors import ConfigError, InputError
from clipkit.models import EncoderConfig, build_model
from clipkit_training.steps import build_step
from tests.clipkit_training.steps.step_worker import BUILDS, tiny_step
from tests.clipkit_training.steps.support import gradients, random_batch, setting, tiny_encoder, train


@pytest.mark.parametrize("name", BUILDS)
def test_one_view_three_views_and_a_batch_of_one_are_refused(name: str) -> None:
    step = tiny_step(name)
    for views in (1, 3):
        with pytest.raises(InputError, match=f"needs two views of each picture, the data gives {views}"):
            step(random_batch(4, views=views))
    with pytest.raises(InputError, match="at least two pictures in each process, this batch has 1"):
        step(random_batch(1))


@pytest.mark.parametrize("name", BUILDS)
def test_a_model_that_is_no_tower_of_pictures_is_refused(name: str) -> None:
    build, config = BUILDS[name]
    tower = {"name": "transformer", "width": 8, "layers": 1, "heads": 1}
    text = build_model(EncoderConfig(modality="text", tower=tower), seed=0)
    for model in (text, nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match=f"step: {name} trains one tower of pictures"):
            build(model, config, setting())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["simclr", "supcon", "moco_v1", "moco_v2", "moco_v3", "instdisc", "nce"])
def test_a_picture_that_is_alone_has_no_negatives(name: str) -> None:
    with pytest.raises(ConfigError, match=r"the training data has one sample.*data\.train"):
        build_step(tiny_encoder("group_norm"), name, setting(samples=1))
    assert build_step(tiny_encoder("group_norm"), "simsiam", setting(samples=1))


@pytest.mark.parametrize("name", ["byol", "moco_v3"])
def test_a_twin_whose_decay_follows_the_run_needs_its_length(name: str) -> None:
    build, config = BUILDS[name]
    with pytest.raises(ConfigError, match=r"the twin's momentum follows the length .*give max_steps"):
        build(tiny_encoder("group_norm"), config, setting(total_steps=None))  # pyright: ignore


@pytest.mark.parametrize("name", BUILDS)
def test_the_figures_of_a_step_are_finite_numbers(name: str) -> None:
    step = tiny_step(name)
    loss, metrics = step(random_batch(8, labels=range(8)))
    torch.testing.assert_close(loss.detach(), metrics["loss"])
    assert {"loss", "embedding_std", "positive_similarity"} <= set(metrics)
    for figure, value in metrics.items():
        assert value.shape == (), figure
        assert not value.requires_grad, figure
        assert torch.isfinite(value), figure
    assert 0.1 < float(metrics["embedding_std"]) < 1.5


@pytest.mark.parametrize("name", BUILDS)
def test_half_precision_gives_nearly_the_same_loss_and_finite_gradients(name: str) -> None:
    batch = random_batch(8, labels=[0, 0, 1, 1, 2, 2, 3, 3])
    wide, _ = tiny_step(name)(batch)
    step = tiny_step(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = step(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wide, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(step).values())


@pytest.mark.parametrize("name", BUILDS)
def test_an_interrupted_step_goes_on_bit_for_bit(name: str) -> None:
    batches = [random_batch(6, seed=seed, labels=[0, 0, 1, 1, 2, 3]) for seed in range(4)]
    whole, half, resumed = tiny_step(name), tiny_step(name), tiny_step(name)
    train(whole, batches)
    train(half, batches[:2])
    resumed.load_state_dict(half.state_dict())
    train(resumed, batches[2:])
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
