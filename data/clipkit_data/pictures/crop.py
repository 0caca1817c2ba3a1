"""Random crops of the encoded picture, drawn before it is decoded: CLIP's augmentation.

The box is cut from the picture at its full size and then scaled to the model's, so nothing is resized twice.
Its numbers are a function of (seed, epoch, sample id), as everywhere.

Shapes: n samples.
"""

import math
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from clipkit.config import Config
from clipkit.decode import Crop, CropOf
from clipkit_data.keyed import Purpose, keyed_uniforms

_TRIES = 10
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]


class CropConfig(Config):
    """RandomResizedCrop of the whole picture (Szegedy et al. 2015, §6), as torchvision draws it.

    Ten tries of an area uniform in `scale` of the picture's and an aspect ratio log-uniform in `ratio`; when
    no try fits into the picture, its centre with the nearest allowed ratio.

    Args:
        scale: Smallest and largest share of the picture's area; CLIP's is [0.9, 1] in open_clip.
        ratio: Smallest and largest width / height of the box, in pixels of the picture.
    """

    scale: tuple[Share, Share] = (0.9, 1.0)
    ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)

    @model_validator(mode="after")
    def _ordered(self) -> "CropConfig":
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError("scale and ratio are (smallest, largest)")
        return self

    def boxes(self, *, seed: int, epoch_n: np.ndarray, id_n: np.ndarray) -> list[CropOf]:
        """For each sample the function from (width, height) in pixels to its box in shares of them.

        Args:
            seed: The run's seed.
            epoch_n, id_n: Epoch and id of each sample, integers (n,).
        """
        uniforms = keyed_uniforms(seed, Purpose.CROP, epoch_n, id_n, 2 * _TRIES + 2)
        return [_Box(self, row) for row in uniforms]


class _Box:
    """The box of one sample, once the picture's size is known."""

    def __init__(self, config: CropConfig, uniforms: np.ndarray) -> None:
        self.config, self.uniforms = config, uniforms

    def __call__(self, width: int, height: int) -> Crop:
        """(left, top, width, height) in shares of the picture's sides; whole pixels of the picture."""
        area_1T, aspect_1T, place_12 = np.split(self.uniforms[None], [_TRIES, 2 * _TRIES], axis=1)
        scale, ratio = self.config.scale, self.config.ratio
        boxes_14 = crop_boxes(area_1T, aspect_1T, place_12, scale, ratio, height, width)
        top, left, high, wide = boxes_14[0].tolist()
        return left / width, top / height, wide / width, high / height


def crop_boxes(
    area_NT: np.ndarray, aspect_NT: np.ndarray, place_N2: np.ndarray,
    scale: tuple[float | np.ndarray, float | np.ndarray], ratio: tuple[float, float], height: int, width: int,
    squashed_N: np.ndarray | float = 1.0,
) -> np.ndarray:  # fmt: skip
    """Random boxes in a picture by torchvision's law: the first try that fits, else the centre.

    Args:
        area_NT, aspect_NT: Uniform numbers in [0, 1) for the tries, (N, T).
        place_N2: The same for the place, down and across, (N, 2).
        scale: Smallest and largest share of the picture's area; one for all or (N, 1).
        ratio: Smallest and largest width / height.
        height, width: Of the picture, pixels.
        squashed_N: How many times wider each picture was for its height before it was squashed to that size;
            `ratio` is of the picture as it was.

    Returns:
        Top, left, height and width, int64 (N, 4).
    """
    (least, most), (narrow, wide) = scale, ratio
    squashed_N = np.broadcast_to(squashed_N, len(area_NT))
    area_NT = height * width * (least + (most - least) * area_NT)
    aspect_NT = np.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * aspect_NT)
    aspect_NT = aspect_NT / squashed_N[:, None]
    width_NT, height_NT = np.rint(np.sqrt(area_NT * aspect_NT)), np.rint(np.sqrt(area_NT / aspect_NT))
    fits_NT = (width_NT > 0) & (width_NT <= width) & (height_NT > 0) & (height_NT <= height)
    first_N, none_N, all_N = fits_NT.argmax(1), ~fits_NT.any(1), np.arange(len(area_NT))
    # The middle of the picture, as much of it as has an allowed aspect.
    most_wide_N = np.maximum(1, np.rint(np.minimum(width, height * wide / squashed_N)))
    most_high_N = np.maximum(1, np.rint(np.minimum(height, width * squashed_N / narrow)))
    width_N = np.where(none_N, most_wide_N, width_NT[all_N, first_N])
    height_N = np.where(none_N, most_high_N, height_NT[all_N, first_N])
    spare_2N = np.stack([height - height_N, width - width_N])
    place_2N = np.where(none_N, spare_2N // 2, np.floor(place_N2.T * (spare_2N + 1)))
    return np.stack([*place_2N, height_N, width_N], axis=1).astype(np.int64)
