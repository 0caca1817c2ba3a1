"""Resizing beside Pillow's: every value, whatever the sizes, the strides and the filter."""

import errno

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit import resample
from clipkit.resample import SUPPORT, resize

SIDES = st.integers(1, 200)


def picture(width: int, height: int, seed: int, *, hard: bool) -> np.ndarray:
    """Noise of all levels, or of black and white alone, which overshoots at every edge."""
    pixels_HW4 = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return np.where(pixels_HW4 < 128, 0, 255).astype(np.uint8) if hard else pixels_HW4


def pillow(pixels_HW4: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels_HW4[..., :3]))
    return np.asarray(image.resize(size, Image.Resampling[interpolation.upper()])).transpose(2, 0, 1)


@given(
    old=st.tuples(SIDES, SIDES),
    new=st.tuples(SIDES, SIDES),
    interpolation=st.sampled_from(sorted(SUPPORT)),
    hard=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(old=(1, 1), new=(200, 200), interpolation="bicubic", hard=True, seed=0)
@example(old=(199, 1), new=(1, 200), interpolation="bilinear", hard=True, seed=0)
@example(old=(81, 161), new=(7, 9), interpolation="bicubic", hard=True, seed=0)
@settings(deadline=None, max_examples=300)
def test_every_value_is_pillows(
    old: tuple[int, int], new: tuple[int, int], interpolation: str, hard: bool, seed: int
) -> None:
    pixels_HW4 = picture(*old, seed, hard=hard)
    ours = resize(pixels_HW4, new, interpolation)
    assert (ours.dtype, ours.shape) == (np.uint8, (3, new[1], new[0]))
    np.testing.assert_array_equal(ours, pillow(pixels_HW4, new, interpolation))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1023, 1024), (300_000, 3), (3, 300_000)])
def test_large_and_long_pictures_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    pixels_HW4 = picture(*size, 0, hard=False)
    for new in ((224, 224), (299, 224), (48, 36)):
        np.testing.assert_array_equal(resize(pixels_HW4, new, "bicubic"), pillow(pixels_HW4, new, "bicubic"))


def test_a_part_of_a_picture_that_must_not_be_written_to() -> None:
    whole_HW4 = picture(90, 70, 0, hard=False)
    whole_HW4.flags.writeable = False
    for part_HW4 in (whole_HW4[3:50, 7:80], whole_HW4[:60:2, ::3], whole_HW4[::-1, 5:]):
        for new in ((20, 30), (100, 8)):  # the second scales columns first
            np.testing.assert_array_equal(resize(part_HW4, new, "bicubic"), pillow(part_HW4, new, "bicubic"))


def test_a_full_disk_costs_the_kept_code_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.FunctionCache.save_overload", full)
    half = resample._compiled("float64(float64)")(_half)
    assert half(5.0) == 2.5
    assert not half.stats.cache_path


def _half(number: float) -> float:
    return number / 2


def test_code_is_compiled_anew_where_it_cannot_be_kept() -> None:
    """Numba keeps a function without a file as little as one whose folders it must not write to."""
    space: dict = {}
    exec("def twice(number): return 2 * number", space)
    twice = resample._compiled("int64(int64)")(space["twice"])
    assert twice(21) == 42
    assert not twice.stats.cache_path
