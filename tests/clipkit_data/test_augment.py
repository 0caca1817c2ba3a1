"""Augmentation: off is off, each change does what it says, and a picture's fate is its own."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from clipkit_data.augment import AugmentConfig, _affine, augment
from clipkit_data.keyed import Purpose, epoch_order, keyed_uniforms

ALL = AugmentConfig(
    crop=0.3, crop_aspect=0.3, flip=0.5, rotate=15, scale=0.1, translate=0.1, shear=8,
    brightness=0.2, contrast=0.2, saturation=0.3,
)  # fmt: skip


def pictures(count: int, side: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").to(torch.uint8)


def run(images: Tensor, config: AugmentConfig, *, seed: int = 1, epoch: int = 0, first: int = 0) -> Tensor:
    ids = np.arange(first, first + len(images))
    return augment(images, config, seed=seed, epoch_N=np.full(len(images), epoch), id_N=ids)


def test_off_changes_nothing() -> None:
    images = pictures(4)
    assert torch.equal(run(images, AugmentConfig()), images)


def test_a_draw_depends_on_seed_epoch_and_id_alone() -> None:
    images = pictures(13)
    whole = run(images, ALL)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    for start, stop in ((0, 1), (1, 5), (5, 13), (12, 13)):
        assert torch.equal(run(images[start:stop], ALL, first=start), whole[start:stop])
    assert not torch.equal(run(images, ALL, epoch=1), whole)
    assert not torch.equal(run(images, ALL, seed=2), whole)
    order = np.random.default_rng(0).permutation(13)
    shuffled = augment(images[order], ALL, seed=1, epoch_N=np.zeros(13, int), id_N=order)
    assert torch.equal(shuffled, whole[order])


def test_flip_mirrors_about_half() -> None:
    images = pictures(200, side=8)
    changed = run(images, AugmentConfig(flip=0.5))
    mirrored = [bool(torch.equal(a, b.flip(-1))) for a, b in zip(changed, images, strict=True)]
    same = [bool(torch.equal(a, b)) for a, b in zip(changed, images, strict=True)]
    assert sum(mirrored) + sum(same) == 200
    assert 70 < sum(mirrored) < 130
    assert torch.equal(run(images, AugmentConfig(flip=1)), images.flip(-1))


def test_what_is_not_covered_is_white() -> None:
    black = torch.zeros(50, 3, 16, 16, dtype=torch.uint8)
    moved = run(black, AugmentConfig(translate=0.4, rotate=45))
    assert moved.max() == 255
    assert (moved == 0).any()
    white = torch.full_like(black, 255)
    assert torch.equal(run(white, AugmentConfig(translate=0.4, rotate=45, scale=0.5)), white)


def test_strengths_bound_the_maps() -> None:
    uniform = keyed_uniforms(3, Purpose.AUGMENT, np.zeros(2000, int), np.arange(2000), 13)
    turned = _affine(uniform, AugmentConfig(rotate=20))
    angle = np.degrees(np.arctan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert 19 < angle.max() <= 20
    assert -20 <= angle.min() < -19
    cut = _affine(uniform, AugmentConfig(crop=0.5))
    area = np.linalg.det(cut[:, :, :2])
    assert 0.5 <= area.min() < 0.51
    assert 0.99 < area.max() <= 1
    corners = np.abs(cut[:, [0, 1], [0, 1]]) + np.abs(cut[:, :, 2])
    assert corners.max() <= 1 + 1e-9  # a crop stays inside the picture
    shifted = _affine(uniform, AugmentConfig(translate=0.25))
    assert 0.49 < np.abs(shifted[:, :, 2]).max() <= 0.5  # a quarter of a side that spans 2
    sized = _affine(uniform, AugmentConfig(scale=0.5))[:, 0, 0]
    assert 1 / 1.5 <= sized.min() < 0.68
    assert 1.48 < sized.max() <= 1.5


def test_colours_against_a_plain_loop() -> None:
    images = pictures(6, side=9)
    config = AugmentConfig(brightness=0.3, contrast=0.4, saturation=0.5)
    uniform = keyed_uniforms(1, Purpose.AUGMENT, np.zeros(6, int), np.arange(6), 13)
    luma = np.array([0.299, 0.587, 0.114])[:, None, None]
    for image, changed, draw in zip(images.numpy(), run(images, config).numpy(), uniform, strict=True):
        bright, contrast, saturate = 1 + np.array([0.3, 0.4, 0.5]) * (2 * draw[10:13] - 1)
        pixels = image.astype(np.float64)
        grey = (pixels * luma).sum(0)
        pixels = bright * (
            contrast * (saturate * pixels + (1 - saturate) * grey) + (1 - contrast) * grey.mean()
        )
        assert np.abs(np.clip(pixels, 0, 255) - changed).max() <= 0.5 + 1e-3


def test_uniforms_are_uniform_and_apart() -> None:
    draws = keyed_uniforms(0, Purpose.CAPTION, np.zeros(20_000, int), np.arange(20_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert np.abs(counts / counts.mean() - 1).max() < 0.06
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    other = keyed_uniforms(0, Purpose.AUGMENT, np.zeros(20_000, int), np.arange(20_000), 4)
    assert abs(np.corrcoef(draws[:, 0], other[:, 0])[0, 1]) < 0.03


def test_epoch_orders() -> None:
    first = epoch_order(5, 0, 1000)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, epoch_order(5, 0, 1000))
    assert not np.array_equal(first, epoch_order(5, 1, 1000))
    assert not np.array_equal(first, epoch_order(6, 0, 1000))


@pytest.mark.parametrize("wrong", [{"flip": 2}, {"crop": 1}, {"rotate": -1}, {"hue": 0.1}])
def test_wrong_strengths_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(wrong)
