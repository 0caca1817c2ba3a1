"""Views: what the families consist of, and that a view is a function of its own key."""

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from clipkit.config import dump_yaml
from clipkit.errors import ConfigError
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.pictures.views import (
    FAMILIES,
    ViewsConfig,
    ViewSpec,
    family,
    make_views,
    multi_crop,
    simclr,
    views_of,
)

ASPECT = (3 / 4, 4 / 3)
SIMCLR = {
    "area": (0.08, 1), "aspect": ASPECT, "interpolation": "bicubic", "flip": 0.5, "jitter_p": 0.8,
    "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "grayscale": 0.2, "blur": 0.5,
}  # fmt: skip
MOCO = {
    "area": (0.2, 1), "aspect": ASPECT, "flip": 0.5, "jitter_p": 0.8,
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2,
}  # fmt: skip
BYOL = {**MOCO, "area": (0.08, 1), "saturation": 0.2, "interpolation": "bicubic"}
SWAV = {**SIMCLR, "interpolation": "bilinear", "blur_kernel": 23}
CHARACTERS = {
    "area": (0.5, 1), "aspect": ASPECT, "rotate": 12, "shear": 10, "scale": 0.15, "translate": 0.08,
    "brightness": 0.3, "contrast": 0.4, "blur": 0.5,
}  # fmt: skip
CHANGES: dict[str, list[dict[str, object]]] = {
    "none": [{}],
    "clip": [{"area": (0.9, 1), "aspect": ASPECT, "interpolation": "bicubic"}],
    "clip_openai": [{"square": True, "interpolation": "bicubic"}],
    "simclr": [SIMCLR] * 2,
    "moco_v1": [{**MOCO, "jitter_p": 1.0, "hue": 0.4, "grayscale_first": True}] * 2,
    "moco_v2": [{**MOCO, "blur": 0.5}] * 2,
    "moco_v3": [
        {**MOCO, "saturation": 0.2, "blur": 1.0},
        {**MOCO, "saturation": 0.2, "blur": 0.1, "solarize": 0.2},
    ],
    "byol": [{**BYOL, "blur": 1.0}, {**BYOL, "blur": 0.1, "solarize": 0.2}],
    "simsiam": [{**MOCO, "blur": 0.5}] * 2,
    "supcon": [MOCO] * 2,
    "characters": [CHARACTERS] * 2,
    "multi_crop": [{**SWAV, "area": (0.14, 1)}] * 2 + [{**SWAV, "area": (0.05, 0.14)}] * 6,
}


def pictures(count: int, height: int = 40, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


def run(images: Tensor, views: ViewsConfig, ids: np.ndarray, epoch: int = 0, seed: int = 3) -> list[Tensor]:
    return make_views(images, views, seed=seed, epoch_N=np.full(len(ids), epoch), id_N=ids)


def test_every_family_does_what_its_paper_says() -> None:
    assert set(FAMILIES) == set(CHANGES)
    for name, changes in CHANGES.items():
        views = family(name).each
        assert [spec.augment for spec in views] == [AugmentConfig.model_validate(each) for each in changes]
        assert all(spec.augment.blur_sigma == (0.1, 2.0) for spec in views)
        assert all(spec.augment.solarize_threshold == 128 for spec in views)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_of_views(name: str) -> None:
    images = pictures(3)
    sizes = [24, 24, *[96] * 6] if name == "multi_crop" else [24] * len(CHANGES[name])
    out = run(images, family(name, 24), np.arange(3))
    assert [tuple(view.shape) for view in out] == [(3, 3, side, side) for side in sizes]
    assert {view.dtype for view in out} == {torch.uint8}
    assert run(images, family(name), np.arange(3))[0].shape == images.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_has_the_same_views_in_any_batch(name: str) -> None:
    images, ids = pictures(9), np.arange(9) * 17
    whole = run(images, family(name, 32), ids)
    order = np.random.default_rng(0).permutation(9)
    for rows in (np.array([4]), np.array([2, 3, 8]), order):
        for view, part in zip(whole, run(images[rows], family(name, 32), ids[rows]), strict=True):
            assert torch.equal(part, view[rows])


def test_views_of_a_picture_differ_and_come_again() -> None:
    images, ids = pictures(6), np.arange(6)
    first, second = run(images, simclr(), ids)
    assert all(not torch.equal(one, two) for one, two in zip(first, second, strict=True))
    again = run(images, simclr(), ids)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    for other in (run(images, simclr(), ids, epoch=1), run(images, simclr(), ids, seed=4)):
        assert not torch.equal(other[0], first)
        assert not torch.equal(other[1], second)


def test_a_view_does_not_depend_on_those_beside_it() -> None:
    images, ids = pictures(4), np.arange(4)
    views = multi_crop(32, small=16, smalls=3)
    out = run(images, views, ids)
    assert len(out) == len(views) == 5
    for number, spec in enumerate(views.each):
        key = {"seed": 3, "epoch_N": np.zeros(4, int), "id_N": ids, "view": number, "size": spec.size}
        assert torch.equal(out[number], augment(images, spec.augment, **key))


def test_the_first_view_is_what_a_single_augmentation_gives() -> None:
    images, ids = pictures(4), np.arange(4)
    config = AugmentConfig(crop=0.5, flip=0.5, hue=0.1)
    (view,) = run(images, ViewsConfig(views=(ViewSpec(augment=config),)), ids)
    assert torch.equal(view, augment(images, config, seed=3, epoch_N=np.zeros(4, int), id_N=ids))


def test_colours_lost_first_are_not_found_again() -> None:
    images = pictures(5)
    lost = AugmentConfig(grayscale=1, grayscale_first=True, saturation=0.9, hue=0.5, contrast=0.5)
    grey = augment(images, lost, seed=0, epoch_N=np.zeros(5, int), id_N=np.arange(5))
    assert (grey.int() - grey[:, :1].int()).abs().max() == 0
    same = AugmentConfig(grayscale=1, grayscale_first=True, contrast=0.5)
    only = augment(images, same, seed=0, epoch_N=np.zeros(5, int), id_N=np.arange(5))
    assert (grey.int() - only.int()).abs().max() <= 1


def test_crops_of_a_large_canvas_are_not_aliased() -> None:
    stripes = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    stripes[..., ::2] = 255
    (view,) = run(stripes, family("none", 96), np.zeros(1, int))
    assert (view.int() - 127).abs().max() <= 32  # without antialiasing the stripes come out black and white


def test_wide_canvases_give_square_views() -> None:
    for name in FAMILIES:
        out = run(pictures(2, 30, 50), family(name, 16), np.arange(2))
        assert out[0].shape == (2, 3, 16, 16)


def test_views_survive_yaml() -> None:
    for name in FAMILIES:
        views = family(name, 224)
        assert ViewsConfig.model_validate(yaml.safe_load(dump_yaml(views))) == views


def test_wrong_views_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'simclrr'.*simclr, moco_v1"):
        family("simclrr")
    for options in ({"strength": -1.0}, {"strength": 9.0}, {"blur": 2.0}, {"strength": "big"}):
        with pytest.raises(ConfigError, match=r"views 'simclr': "):
            family("simclr", 32, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"views 'simclr': .*size"):
        views_of({"family": "simclr", "size": "big"})
    assert len(family("simclr", 32, strength=1.5)) == 2
    for wrong in ({"views": []}, {"views": [{"size": 0}]}, {"views": [{"count": 0}]}, {"view": []}):
        with pytest.raises(ValidationError):
            ViewsConfig.model_validate(wrong)
