"""Augmentation: off is off, each change does what it says, and a picture's fate is its own."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from clipkit_data.keyed import Purpose, epoch_order, keyed_integers, keyed_uniforms
from clipkit_data.pictures.augment import AugmentConfig, _affine, _boxes, augment

ALL = AugmentConfig(
    crop=0.3, crop_aspect=0.3, flip=0.5, rotate=15, scale=0.1, translate=0.1, shear=8,
    jitter_p=0.8, brightness=0.2, contrast=0.2, saturation=0.3, hue=0.2, grayscale=0.2,
    blur=0.5, blur_kernel=5, solarize=0.2,
)  # fmt: skip
SEEDS = st.integers(0, 2**63 - 1)


def pictures(count: int, side: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, side, mode="bilinear").to(torch.uint8)


def run(
    images: Tensor, config: AugmentConfig, *, seed: int = 1, epoch: int = 0, first: int = 0, **more: Any
) -> Tensor:
    ids = np.arange(first, first + len(images))
    return augment(images, config, seed=seed, epoch_N=np.full(len(images), epoch), id_N=ids, **more)


def draws(count: int, seed: int = 3) -> np.ndarray:
    return keyed_uniforms(seed, Purpose.AUGMENT, np.zeros(count, int), np.arange(count), 60)


def test_off_changes_nothing() -> None:
    images = pictures(4)
    assert torch.equal(run(images, AugmentConfig()), images)
    assert torch.equal(run(images, AugmentConfig(hue=0.5, contrast=0.9, jitter_p=0)), images)
    assert run(images[:0], ALL, size=20).shape == (0, 3, 20, 20)


def test_a_draw_depends_on_seed_epoch_view_and_id_alone() -> None:
    images = pictures(13, side=150)  # more than are handled at once
    whole = run(images, ALL)
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    for start, stop in ((0, 1), (1, 5), (5, 13), (12, 13)):
        assert torch.equal(run(images[start:stop], ALL, first=start), whole[start:stop])
    assert not torch.equal(run(images, ALL, epoch=1), whole)
    assert not torch.equal(run(images, ALL, seed=2), whole)
    assert not torch.equal(run(images, ALL, view=1), whole)
    assert torch.equal(run(images, ALL, view=0), whole)
    order = np.random.default_rng(0).permutation(13)
    shuffled = augment(images[order], ALL, seed=1, epoch_N=np.zeros(13, int), id_N=order)
    assert torch.equal(shuffled, whole[order])


def test_threads_change_nothing() -> None:
    threads, images = torch.get_num_threads(), pictures(2, side=300)
    config = ALL.model_copy(update={"contrast": 0.9, "jitter_p": 1.0, "interpolation": "bicubic"})
    try:
        torch.set_num_threads(1)
        alone = run(images, config)
        torch.set_num_threads(3)
        assert torch.equal(run(images, config), alone)
    finally:
        torch.set_num_threads(threads)


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
    uniform = draws(2000)
    turned = _affine(uniform, AugmentConfig(rotate=20))
    angle = np.degrees(np.arctan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert 19 < angle.max() <= 20
    assert -20 <= angle.min() < -19
    shifted = _affine(uniform, AugmentConfig(translate=0.25))
    assert 0.49 < np.abs(shifted[:, :, 2]).max() <= 0.5  # a quarter of a side that spans 2
    sized = _affine(uniform, AugmentConfig(scale=0.5))[:, 0, 0]
    assert 1 / 1.5 <= sized.min() < 0.68
    assert 1.48 < sized.max() <= 1.5


def test_the_short_forms_of_crops_mean_their_ranges() -> None:
    short, long = (
        AugmentConfig(crop=0.5, crop_aspect=1 / 3),
        AugmentConfig(area=(0.5, 1), aspect=(3 / 4, 4 / 3)),
    )
    boxes = _boxes(draws(2000), short, 100, 100)
    assert np.array_equal(boxes, _boxes(draws(2000), long, 100, 100))
    assert 0.49 <= (boxes[:, 2] * boxes[:, 3]).min() / 100**2 < 0.51
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 100).all()  # a crop stays inside the picture


def test_a_square_is_as_large_as_fits_and_anywhere() -> None:
    boxes = _boxes(draws(500), AugmentConfig(square=True), 40, 64)
    assert (boxes[:, 2:] == 40).all()
    assert (boxes[:, 0] == 0).all()
    assert set(boxes[:, 1]) == set(range(25))
    assert run(pictures(3)[:, :, :20], AugmentConfig(square=True), size=16).shape == (3, 3, 16, 16)


def test_a_size_alone_resizes_the_whole_picture() -> None:
    images = pictures(3)
    wanted = resize(images, [20, 20], antialias=True)
    assert (run(images, AugmentConfig(), size=20).int() - wanted.int()).abs().max() <= 1
    assert torch.equal(run(images, AugmentConfig(), size=33), images)


def test_a_turn_keeps_the_shape_of_things_on_a_wide_canvas() -> None:
    rows, columns = torch.meshgrid(torch.arange(60) - 29.5, torch.arange(120) - 59.5, indexing="ij")
    bar = torch.where((rows.abs() < 5) & (columns.abs() < 20), 0, 255).to(torch.uint8)
    turned = run(bar.expand(40, 3, 60, 120).contiguous(), AugmentConfig(rotate=90))
    ink = (255 - turned[:, 0].double()).sum((1, 2)) / 255
    assert (ink / (10 * 40) - 1).abs().max() < 0.03


def test_a_view_is_drawn_apart_from_the_others() -> None:
    one, two = (
        keyed_uniforms(0, Purpose.AUGMENT, np.zeros(20_000, int), np.arange(20_000), 4, view=view)
        for view in (1, 2)
    )
    plain = draws(20_000, seed=0)[:, :4]
    for first, second in ((plain, one), (plain, two), (one, two)):
        assert np.abs(np.corrcoef(first.T, second.T)[:4, 4:]).max() < 0.03


def test_numbers_of_the_first_view_stay_as_they_were() -> None:
    numbers = keyed_integers(7, Purpose.AUGMENT, np.arange(3), np.arange(3) * 10, 2)
    assert numbers.tolist() == [
        [11812260261683741590, 2263302781627240663],
        [5883627093202140139, 12389226860734808408],
        [9447573830832956699, 1462492766990871],
    ]


@settings(deadline=None)
@given(SEEDS, st.lists(st.tuples(st.integers(0, 2**40), SEEDS), min_size=1, max_size=6), st.integers(0, 300))
def test_a_number_is_a_function_of_its_key(seed: int, keys: list[tuple[int, int]], view: int) -> None:
    epochs, ids = np.array(keys).T
    numbers = keyed_integers(seed, Purpose.AUGMENT, epochs, ids, 5, view=view)
    for row, (epoch, sample) in zip(numbers, keys, strict=True):
        alone = keyed_integers(seed, Purpose.AUGMENT, np.array([epoch]), np.array([sample]), 3, view=view)
        assert np.array_equal(row[:3], alone[0])
    other = keyed_integers(seed, Purpose.AUGMENT, epochs, ids, 5, view=view + 1)
    assert not (numbers == other).any()


CONFIGS = st.builds(
    AugmentConfig,
    area=st.sampled_from([(1, 1), (0.08, 1), (0.05, 0.14)]),
    aspect=st.sampled_from([(1, 1), (3 / 4, 4 / 3)]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    flip=st.sampled_from([0, 0.5]),
    rotate=st.sampled_from([0, 30]),
    translate=st.sampled_from([0, 0.2]),
    jitter_p=st.sampled_from([0.5, 1]),
    brightness=st.sampled_from([0, 0.8]),
    contrast=st.sampled_from([0, 0.8]),
    saturation=st.sampled_from([0, 0.8]),
    hue=st.sampled_from([0, 0.2, 0.5]),
    grayscale=st.sampled_from([0, 0.3]),
    grayscale_first=st.booleans(),
    blur=st.sampled_from([0, 0.5, 1]),
    blur_kernel=st.sampled_from([0, 5, 99]),
    solarize=st.sampled_from([0, 0.5]),
    solarize_threshold=st.sampled_from([0, 100, 128]),
)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, size=st.sampled_from([None, 11, 31]), data=st.data())
def test_a_picture_is_the_same_in_any_company(
    config: AugmentConfig, size: int | None, data: st.DataObject
) -> None:
    seed, view, images = data.draw(SEEDS), data.draw(st.integers(0, 7)), pictures(7, side=21)
    ids = np.arange(7) * 1000
    key = {"seed": seed, "view": view, "size": size}
    whole = augment(images, config, epoch_N=ids // 3, id_N=ids, **key)
    assert whole.dtype == torch.uint8
    rows = np.array(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)))
    part = augment(images[rows], config, epoch_N=ids[rows] // 3, id_N=ids[rows], **key)
    assert torch.equal(part, whole[rows])


def test_uniforms_are_uniform_and_apart() -> None:
    numbers = keyed_uniforms(0, Purpose.CAPTION, np.zeros(20_000, int), np.arange(20_000), 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert np.abs(counts / counts.mean() - 1).max() < 0.06
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.03
    other = keyed_uniforms(0, Purpose.AUGMENT, np.zeros(20_000, int), np.arange(20_000), 4)
    assert abs(np.corrcoef(numbers[:, 0], other[:, 0])[0, 1]) < 0.03


def test_epoch_orders() -> None:
    first = epoch_order(5, 0, 1000)
    assert sorted(first) == list(range(1000))
    assert np.array_equal(first, epoch_order(5, 0, 1000))
    assert not np.array_equal(first, epoch_order(5, 1, 1000))
    assert not np.array_equal(first, epoch_order(6, 0, 1000))


@pytest.mark.parametrize(
    "wrong",
    [
        {"flip": 2},
        {"crop": 1},
        {"rotate": -1},
        {"hue": 0.6},
        {"posterize": 0.1},
        {"area": [0.5, 0.2]},
        {"area": [0.5, 1.5]},
        {"aspect": [0, 1]},
        {"area": [0.5, 1], "crop": 0.2},
        {"aspect": [0.5, 1], "crop_aspect": 0.2},
        {"square": True, "crop": 0.2},
        {"blur_sigma": [2, 1]},
        {"blur_kernel": 4},
        {"solarize_threshold": 256},
    ],
)
def test_wrong_strengths_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(wrong)
