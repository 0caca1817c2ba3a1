"""Augmentation of a batch of uint8 pictures: one affine map and one colour map per picture.

Crop, flip, rotation, scale, shear and shift are composed into one 2 × 3 matrix per picture, so the whole
batch is resampled once; brightness, contrast and saturation are one 3 × 3 matrix and an offset. The numbers
come from (seed, epoch, sample id) and every step is the same whatever else is in the batch, so a picture is
augmented bit by bit the same for any number of workers and ranks.

Shapes: N pictures, S side in pixels, K random numbers per picture.
"""

import math
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clipkit.config import Config
from clipkit_data.keyed import Purpose, keyed_uniforms

Share = Annotated[float, Field(ge=0, lt=1)]
_DRAWS = 13
_LUMA = (0.299, 0.587, 0.114)


class AugmentConfig(Config):
    """How strongly pictures are changed; 0 is off everywhere.

    Args:
        crop: Share of the area that may be cut away: the crop's area is uniform in [1 − crop, 1].
        crop_aspect: Crops are stretched by a factor log-uniform in [1/(1 + a), 1 + a].
        flip: Probability of mirroring left and right. Leave it off where captions say left or right.
        rotate: Largest angle, degrees.
        scale: Sizes change by a factor log-uniform in [1/(1 + s), 1 + s].
        translate: Largest shift, as a share of the side.
        shear: Largest shear angle, degrees.
        brightness, contrast, saturation: Factors uniform in [1 − x, 1 + x].
    """

    crop: Share = 0.0
    crop_aspect: Annotated[float, Field(ge=0)] = 0.0
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Annotated[float, Field(ge=0)] = 0.0
    translate: Share = 0.0
    shear: Annotated[float, Field(ge=0, lt=80)] = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0

    @property
    def moves(self) -> bool:
        """Whether pixels change place."""
        return any(
            (self.crop, self.crop_aspect, self.flip, self.rotate, self.scale, self.translate, self.shear)
        )

    @property
    def colours(self) -> bool:
        """Whether pixels change colour."""
        return any((self.brightness, self.contrast, self.saturation))


def augment(
    images_N3SS: Tensor, config: AugmentConfig, *, seed: int, epoch_N: np.ndarray, id_N: np.ndarray
) -> Tensor:
    """The pictures, each changed at random as (seed, epoch, sample id) says.

    Args:
        images_N3SS: uint8 (N, 3, S, S), on any device.
        config: How strongly.
        seed: The run's seed.
        epoch_N: Epoch of each picture, integers (N,).
        id_N: Sample id of each picture, integers (N,).

    Returns:
        uint8 (N, 3, S, S); what a picture does not cover is white.
    """
    if not len(images_N3SS) or not (config.moves or config.colours):
        return images_N3SS
    uniform_NK = keyed_uniforms(seed, Purpose.AUGMENT, epoch_N, id_N, _DRAWS)
    if config.moves:
        images_N3SS = _move(images_N3SS, _affine(uniform_NK, config))
    if config.colours:
        images_N3SS = _colour(images_N3SS, uniform_NK[:, 10:13], config)
    return images_N3SS


def _affine(uniform_NK: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """For each picture the matrix (2, 3) from output to input coordinates, both in [−1, 1].

    input = Rotation · Shear · Zoom · Crop · Flip · output + shift
    """
    signed_NK = 2 * uniform_NK - 1
    angle_N = np.radians(config.rotate) * signed_NK[:, 0]
    shear_N = np.tan(np.radians(config.shear) * signed_NK[:, 1])
    zoom_N = np.exp(math.log1p(config.scale) * signed_NK[:, 2])
    area_N = 1 - config.crop * uniform_NK[:, 3]
    stretch_N = np.exp(0.5 * math.log1p(config.crop_aspect) * signed_NK[:, 4])
    width_N = np.minimum(np.sqrt(area_N) * stretch_N, 1)
    height_N = np.minimum(np.sqrt(area_N) / stretch_N, 1)
    mirror_N = np.where(uniform_NK[:, 5] < config.flip, -1.0, 1.0)
    cos_N, sin_N = np.cos(angle_N), np.sin(angle_N)
    matrix_N23 = np.empty((len(uniform_NK), 2, 3))
    matrix_N23[:, 0, 0] = cos_N * zoom_N * width_N * mirror_N
    matrix_N23[:, 1, 0] = sin_N * zoom_N * width_N * mirror_N
    matrix_N23[:, 0, 1] = (cos_N * shear_N - sin_N) * zoom_N * height_N
    matrix_N23[:, 1, 1] = (sin_N * shear_N + cos_N) * zoom_N * height_N
    # Coordinates span 2, so a share of the side is twice as much here.
    matrix_N23[:, 0, 2] = (1 - width_N) * signed_NK[:, 6] + 2 * config.translate * signed_NK[:, 7]
    matrix_N23[:, 1, 2] = (1 - height_N) * signed_NK[:, 8] + 2 * config.translate * signed_NK[:, 9]
    return matrix_N23


def _move(images_N3SS: Tensor, matrix_N23: np.ndarray) -> Tensor:
    """The pictures resampled (bilinear) where the matrices say.

    The grid is built element by element: a batched matrix product may round differently for another N.
    """
    side, device = images_N3SS.shape[-1], images_N3SS.device
    axis_S = ((torch.arange(side, dtype=torch.float32, device=device) + 0.5) * 2 - side) / side
    matrix = torch.from_numpy(matrix_N23.astype(np.float32)).to(device)[:, :, :, None, None]
    x_S, y_S = axis_S[None, None, :], axis_S[None, :, None]
    columns, rows = (matrix[:, i, 0] * x_S + matrix[:, i, 1] * y_S + matrix[:, i, 2] for i in (0, 1))
    grid_NSS2 = torch.stack([columns, rows], dim=-1)
    ink_N3SS = 255 - images_N3SS.to(torch.float32)  # grid_sample fills with 0, and 0 ink is white
    moved_N3SS = F.grid_sample(
        ink_N3SS, grid_NSS2, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return (255 - moved_N3SS).round_().clamp_(0, 255).to(torch.uint8)


def _colour(images_N3SS: Tensor, uniform_N3: np.ndarray, config: AugmentConfig) -> Tensor:
    """Saturation around each pixel's grey, contrast around the picture's mean grey, then brightness.

    out = b · (c · (s · x + (1 − s) · grey(x)) + (1 − c) · mean grey)
    """
    device = images_N3SS.device
    strength_3 = np.array([config.brightness, config.contrast, config.saturation])
    factor_N3 = 1 + strength_3 * (2 * uniform_N3 - 1)
    # Sums of integers are exact in any order; a float mean might differ in its last bit for another N.
    sum_N3 = images_N3SS.flatten(2).sum(-1, dtype=torch.int64).cpu().numpy()
    mean_N = (sum_N3 * _LUMA).sum(-1) / images_N3SS[0, 0].numel()
    bright_N, contrast_N, saturate_N = factor_N3.T
    own_N = bright_N * contrast_N * saturate_N
    grey_N = bright_N * contrast_N * (1 - saturate_N)
    offset_N = bright_N * (1 - contrast_N) * mean_N
    own, grey, offset = (
        torch.from_numpy(part.astype(np.float32)).to(device)[:, None, None]
        for part in (own_N, grey_N, offset_N)
    )
    red, green, blue = images_N3SS.to(torch.float32).unbind(1)
    common_NSS = (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]) * grey + offset
    out_N3SS = torch.stack([channel * own + common_NSS for channel in (red, green, blue)], dim=1)
    return out_N3SS.round_().clamp_(0, 255).to(torch.uint8)
