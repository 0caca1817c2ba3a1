"""Random crops of whole pictures: torchvision's law, keyed draws, and boxes that fit."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from clipkit.images import Preprocess
from clipkit_data.batches.content import WholePictures
from clipkit_data.batches.loader import TrainBatches
from clipkit_data.dataset import ShardDataset
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import ViewsConfig, ViewSpec, family


def boxes(config: CropConfig, count: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Boxes (count, 4) in pixels: left, top, width, height."""
    draws = config.boxes(seed=seed, epoch_n=np.zeros(count, dtype=np.int64), id_n=np.arange(count))
    return np.array([box(width, height) for box in draws]) * [width, height, width, height]


@pytest.mark.parametrize(
    ("scale", "size"), [((0.9, 1.0), (640, 480)), ((0.08, 1.0), (300, 500)), ((0.5, 0.7), (64, 64))]
)
def test_boxes_have_the_distribution_of_torchvision(
    scale: tuple[float, float], size: tuple[int, int]
) -> None:
    width, height = size
    ours = boxes(CropConfig(scale=scale), 4000, width, height)
    torch.manual_seed(0)
    picture = torch.zeros(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)]
    )[:, [1, 0, 3, 2]]
    for figure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        a, b = np.sort(figure(ours)), np.sort(figure(theirs))
        grid = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 4000
        assert gap < 0.045  # Kolmogorov and Smirnov: 0.0436 is exceeded once in a thousand


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_every_box_is_whole_pixels_inside_the_picture(
    width: int, height: int, scale: list[float], ratio: list[float], seed: int
) -> None:
    config = CropConfig(scale=(scale[0], scale[1]), ratio=(ratio[0], ratio[1]))
    found = boxes(config, 4, width, height, seed)
    assert np.allclose(found, found.round(), atol=1e-6)
    left, top, w, h = found.round().T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (w >= 1).all()
    assert (h >= 1).all()
    assert (left + w <= width).all()
    assert (top + h <= height).all()


def test_a_picture_too_long_for_any_box_gives_its_centre() -> None:
    found = boxes(CropConfig(scale=(0.9, 1.0)), 3, 1000, 100)
    assert found.round().tolist() == [[433, 0, 133, 100]] * 3


def test_a_box_is_a_function_of_its_key() -> None:
    config, ids = CropConfig(scale=(0.1, 1.0)), np.arange(20)

    def draw(seed: int, epoch: int, of: np.ndarray) -> list[tuple[float, ...]]:
        draws = config.boxes(seed=seed, epoch_n=np.full(len(of), epoch), id_n=of)
        return [box(640, 480) for box in draws]

    whole = draw(1, 2, ids)
    assert [draw(1, 2, ids[n : n + 1])[0] for n in range(20)] == whole
    assert draw(1, 2, ids[::-1]) == whole[::-1]
    assert not set(whole) & set(draw(1, 3, ids))
    assert not set(whole) & set(draw(2, 2, ids))


def test_ranges_are_smallest_then_largest() -> None:
    with pytest.raises(ValueError, match="smallest, largest"):
        CropConfig(scale=(1.0, 0.5))
    with pytest.raises(ValueError, match="smallest, largest"):
        CropConfig(ratio=(2.0, 0.5))


@pytest.mark.parametrize(("workers", "cache"), [(0, False), (0, True), (2, False)])
def test_views_are_cut_from_the_whole_picture(
    write_shard: Callable[..., Path], workers: int, cache: bool
) -> None:
    """What lies beside the central square of a wide picture comes into views, wherever they are made."""
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[:, :30, 0] = pixels[:, -30:, 2] = 255
    with BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        samples = [{"__key__": f"{i:04d}", "png": file.getvalue(), "txt": b"a"} for i in range(12)]
    data, views = ShardDataset([write_shard("00000.tar", samples)]), family("moco_v2", 32)
    content = WholePictures(Preprocess(size=64))
    batches = TrainBatches(data, content, None, batch_size=12, workers=workers, cache=cache, seed=3)
    there = next(iter(batches))
    assert there.images.shape == (12, 3, 64, 64)
    assert there.ratios is not None
    assert there.ratios.tolist() == [160 / 90] * 12
    inside = TrainBatches(data, content, None, batch_size=12, workers=workers, augment=views, seed=3)
    here = next(iter(inside)).views
    later = there.augmented(views, 3).views
    assert all(torch.equal(one, other) for one, other in zip(here, later, strict=True))
    plain = ViewsConfig(
        views=(ViewSpec(augment=AugmentConfig(area=(0.08, 1), aspect=(3 / 4, 4 / 3)), size=32),)
    )
    view_BCSS = there.augmented(plain, 3).views[0].float()
    assert (view_BCSS[:, 0].amax((1, 2)) > 200).any()
    assert (view_BCSS[:, 2].amax((1, 2)) > 200).any()
