"""Augmentation against torchvision's: every change at the same parameters, and the parameters' laws."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from clipkit_data.keyed import Purpose, keyed_uniforms
from clipkit_data.pictures import augment as draws
from clipkit_data.pictures import pixels as ours
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.pictures.pixels import Blend
from clipkit_data.pictures.views import family

DRAWS = 4000
SIDE = 64


def pictures(count: int = 8, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Half smooth with saturated colours, half noise: the last is the hardest for any resampling."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count // 2, 3, 4, 4, generator=generator) * 400 - 70
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 255)
    noise = torch.rand(count - count // 2, 3, height, width, generator=generator) * 255
    return torch.cat([smooth, noise]).to(torch.uint8)


def uniforms(seed: int = 5) -> np.ndarray:
    return keyed_uniforms(seed, Purpose.AUGMENT, np.zeros(DRAWS, int), np.arange(DRAWS), draws._DRAWS)


def distance(ours: Tensor, theirs: Tensor) -> int:
    return int((ours.int() - theirs.int()).abs().max())


def blended(images: Tensor, **weights: float) -> Tensor:
    """Our colour step with the same weights for every picture, as bytes."""
    filled = {name: np.full(len(images), weights.get(name, 0.0)) for name in Blend._fields}
    return ours.colour(images.to(torch.float32), [Blend(**filled)]).round().to(torch.uint8)


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """The Kolmogorov–Smirnov distance as a multiple of its critical value at 0.1 %."""
    both = np.sort(np.concatenate([first, second]))
    shares = [np.searchsorted(np.sort(part), both, side="right") / len(part) for part in (first, second)]
    critical = 1.95 * np.sqrt((len(first) + len(second)) / (len(first) * len(second)))
    return float(np.abs(shares[0] - shares[1]).max() / critical)


def assert_one_law(boxes: np.ndarray, theirs: np.ndarray) -> None:
    """Boxes (top, left, height, width) have areas, aspects and places of one distribution."""
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert apart(measure(boxes), measure(theirs)) < 1


@pytest.mark.parametrize("factor", [0.2, 0.7, 1.0, 1.4, 1.8])
def test_jitter_at_the_same_factor(factor: float) -> None:
    images = pictures()
    changed = blended(images, own=factor)
    assert distance(changed, TF.adjust_brightness(images, factor)) <= 1
    changed = blended(images, own=factor, mean=1 - factor)
    assert distance(changed, TF.adjust_contrast(images, factor)) <= 2
    changed = blended(images, own=factor, grey=1 - factor)
    assert distance(changed, TF.adjust_saturation(images, factor)) <= 2


@pytest.mark.parametrize("turn", [-0.5, -0.2, -0.03, 0.1, 0.25, 0.4])
def test_hue_at_the_same_turn(turn: float) -> None:
    images = pictures()
    images[0] = images[0, :1]  # grey pixels have no hue
    images[1, :, :10] = torch.tensor([255, 255, 0])[:, None, None]  # two channels share the maximum
    assert distance(blended(images, own=1, hue=turn), TF.adjust_hue(images, turn)) <= 1


def test_grey_is_grey() -> None:
    images = pictures()
    assert distance(blended(images, grey=1), TF.rgb_to_grayscale(images, 3)) <= 1


@pytest.mark.parametrize(("sigma", "kernel"), [(0.1, 5), (0.5, 7), (1.2, 7), (2.0, 23), (2.0, 0)])
def test_blur_at_the_same_sigma(sigma: float, kernel: int) -> None:
    images = pictures()
    config = AugmentConfig(blur=1, blur_sigma=(sigma, sigma), blur_kernel=kernel)
    blurred = augment(images, config, seed=0, epoch_N=np.zeros(8, int), id_N=np.arange(8))
    width = kernel or 2 * (SIDE // 10 // 2) + 1
    assert distance(blurred, TF.gaussian_blur(images, [width, width], [sigma, sigma])) <= 1


@pytest.mark.parametrize("threshold", [0, 100, 128, 255])
def test_solarize_at_the_same_threshold(threshold: int) -> None:
    images = pictures()
    config = AugmentConfig(solarize=1, solarize_threshold=threshold)
    changed = augment(images, config, seed=0, epoch_N=np.zeros(8, int), id_N=np.arange(8))
    assert torch.equal(changed, TF.solarize(images, threshold))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [24, 64, 96])
@pytest.mark.parametrize("floats", [False, True], ids=["bytes", "floats"])
def test_a_crop_of_the_same_box(interpolation: str, side: int, floats: bool) -> None:
    images = pictures(8, 64, 80)
    boxes = np.array(
        [[0, 0, 64, 80], [3, 5, 20, 17], [10, 0, 54, 60], [60, 70, 4, 10],
         [1, 1, 63, 47], [0, 20, 30, 60], [7, 9, 33, 31], [63, 79, 1, 1]]
    )  # fmt: skip
    pixels = images.to(torch.float32) if floats else images  # a GPU resizes floats, a CPU bytes
    changed = ours.crop(pixels, boxes, side, side, interpolation)
    mode = T.InterpolationMode(interpolation)
    for image, (top, left, high, wide), crop in zip(images, boxes.tolist(), changed, strict=True):
        wanted = TF.resized_crop(image, top, left, high, wide, [side, side], interpolation=mode)
        assert distance(crop, wanted) <= (2 if floats else 0)


def test_jitter_is_torchvisions_in_the_order_that_was_drawn() -> None:
    config = AugmentConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    images, uniform = pictures(), uniforms()[:8]
    factors = 1 + 0.8 * (2 * uniform[:, 10:13] - 1)
    turns = 0.2 * (2 * uniform[:, 13] - 1)
    orders = list(itertools.permutations(range(4)))
    changed = augment(images, config, seed=5, epoch_N=np.zeros(8, int), id_N=np.arange(8))
    for i, image in enumerate(images):
        wanted = image.double() / 255
        for change in orders[int(uniform[i, 15] * 24)]:
            function: Callable[..., Tensor] = (
                TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue,
            )[change]  # fmt: skip
            wanted = function(wanted, [*factors[i], turns[i]][change])
        assert distance(changed[i], (wanted * 255).round()) <= 1


@pytest.mark.parametrize("height", [SIDE, 40, 20], ids=["square", "wide", "too wide"])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.9, 1.0), (0.05, 0.14)])
def test_crops_follow_torchvisions_law(height: int, area: tuple[float, float]) -> None:
    torch.manual_seed(0)
    law, image = T.RandomResizedCrop(SIDE, scale=area), [torch.zeros(3, height, SIDE, dtype=torch.uint8)]
    drawn = [law.make_params(image) for _ in range(DRAWS)]
    theirs = np.array([[box[side] for side in ("top", "left", "height", "width")] for box in drawn])
    boxes = draws._boxes(uniforms(), AugmentConfig(area=area, aspect=(3 / 4, 4 / 3)), height, SIDE)
    assert_one_law(boxes, theirs)
    whole = (boxes[:, 2:] == [height, SIDE]).all(1).mean(), (theirs[:, 2:] == [height, SIDE]).all(1).mean()
    assert abs(whole[0] - whole[1]) < 0.04


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 36), (20, 64)], ids=["4:3", "9:16", "wide"])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_of_squashed_pictures_are_those_of_the_whole(
    height: int, width: int, area: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    law = T.RandomResizedCrop(SIDE, scale=area)
    image = [torch.zeros(3, 1, 1).expand(3, 64 * height, 64 * width)]
    drawn = [law.make_params(image) for _ in range(DRAWS)]
    theirs = np.array([[box[side] for side in ("top", "left", "height", "width")] for box in drawn], float)
    config, ratio_N = AugmentConfig(area=area, aspect=(3 / 4, 4 / 3)), np.full(DRAWS, width / height)
    boxes = draws._boxes(uniforms(), config, 64 * SIDE, 64 * SIDE, ratio_N).astype(float)
    boxes[:, [0, 2]] *= height / SIDE
    boxes[:, [1, 3]] *= width / SIDE
    assert_one_law(boxes, theirs)
    assert (boxes[:, :2] + boxes[:, 2:] <= [64 * height, 64 * width]).all()


@pytest.mark.parametrize("config", [{}, {"square": True}, {"area": (0.3, 0.5)}], ids=str)
def test_squashed_pictures_come_out_unsquashed(config: dict[str, Any]) -> None:
    """A disc in a wide and in a tall picture is a disc in every view that has all of it."""
    for high, wide in ((96, 192), (192, 96)):
        y, x = np.mgrid[:high, :wide]
        disc = ((y - high / 2 + 0.5) ** 2 + (x - wide / 2 + 0.5) ** 2 < 30**2).astype(np.uint8) * 255
        whole = torch.from_numpy(disc)[None, None].expand(1, 3, -1, -1).contiguous()
        squashed = TF.resize(whole, [256, 256], antialias=True).expand(40, -1, -1, -1)
        views = augment(
            squashed, AugmentConfig(**config), seed=1, epoch_N=np.zeros(40, int), id_N=np.arange(40), size=96,
            ratio_N=np.full(40, wide / high),
        )  # fmt: skip
        seen = 0
        for view in (views[:, 0] > 127).numpy():
            rows, columns = np.flatnonzero(view.any(1)), np.flatnonzero(view.any(0))
            ends = {0, 95} & {*rows[[0, -1]], *columns[[0, -1]]} if len(rows) else {0}
            if not ends:
                seen += 1
                assert abs(np.ptp(columns) - np.ptp(rows)) <= 2
        assert seen >= 5


@pytest.mark.parametrize("strength", [(0.4, 0.4, 0.2, 0.1), (1.2, 1.0, 1.5, 0.3)])
def test_factors_and_orders_follow_torchvisions_law(strength: tuple[float, float, float, float]) -> None:
    torch.manual_seed(0)
    law = T.ColorJitter(*strength)
    drawn = [law.make_params([]) for _ in range(DRAWS)]
    names = ("brightness", "contrast", "saturation", "hue")
    config = AugmentConfig.model_validate(dict(zip(names, strength, strict=True)))
    steps = draws._blends(uniforms(), config)[:4]
    changes = {
        "brightness_factor": 1 + sum((s.own - 1) * (s.grey + s.mean == 0) for s in steps),
        "contrast_factor": 1 - sum(s.mean for s in steps),
        "saturation_factor": 1 - sum(s.grey for s in steps),
        "hue_factor": sum(s.hue for s in steps),
    }
    assert all(np.min(changes[f"{name}_factor"]) >= 0 for name in names[:3])
    for name, mine in changes.items():
        assert apart(np.asarray(mine), np.array([params[name] for params in drawn])) < 1
    kinds = np.stack([1 * (s.mean != 0) + 2 * (s.grey != 0) + 3 * (s.hue != 0) for s in steps])
    assert (np.sort(kinds, axis=0) == np.arange(4)[:, None]).all()
    counts = np.unique(kinds, axis=1, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - DRAWS / 24) ** 2 / (DRAWS / 24)).sum() < 50  # chi-squared, 23 degrees: 0.1 % is 49.7


def test_sigmas_follow_torchvisions_law() -> None:
    torch.manual_seed(0)
    law = T.GaussianBlur(23, (0.1, 2.0))
    theirs = np.array([law.make_params([])["sigma"][0] for _ in range(DRAWS)])
    blurred, sigmas = draws._sigmas(uniforms(), AugmentConfig(blur=0.5))
    assert abs(len(blurred) / DRAWS - 0.5) < 0.03
    assert apart(sigmas, theirs) < 1


def test_changes_come_as_often_as_they_should() -> None:
    colour = pictures(2, 8, 8)[1:].expand(DRAWS, 3, 8, 8).contiguous()
    key = {"seed": 9, "epoch_N": np.zeros(DRAWS, int), "id_N": np.arange(DRAWS)}
    second = family("byol").each[1].augment
    for config, share in (
        (AugmentConfig(flip=second.flip), 0.5),
        (AugmentConfig(grayscale=second.grayscale), 0.2),
        (AugmentConfig(solarize=second.solarize), 0.2),
        (AugmentConfig(blur=second.blur, blur_sigma=(1, 1), blur_kernel=3), 0.1),
        (AugmentConfig(hue=0.5, jitter_p=second.jitter_p), 0.8),
    ):
        changed = (augment(colour, config, **key) != colour).flatten(1).any(1).double().mean()
        assert abs(float(changed) - share) < 4 * np.sqrt(share * (1 - share) / DRAWS) + 0.005
