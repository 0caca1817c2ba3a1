"""Augmentation of a batch of uint8 pictures, each changed by numbers that its own key draws.

Steps, in this order: turn (rotation, scale, shear and shift as one affine map), crop and resize, flip,
colour jitter, grey, blur, solarize. The numbers come from (seed, epoch, sample id, view) and every step
treats a picture the same whatever else is in the batch, so a picture is augmented bit by bit the same for
any number of workers and ranks. All of it runs where the pictures are. The numbers are drawn on the host
and are equal everywhere; pixels on a CPU and on a GPU may differ by a level through the rounding of floats,
by two after a bicubic resize, and a strong jitter enlarges that. The frames of a clip are changed alike.

Meaning and parameters are torchvision's (v2: RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur,
RandomSolarize), except that colours stay floating point from the first step to the last: torchvision cuts
uint8 pictures down to whole levels after each.

Shapes: N pictures or clips, F frames of a clip, H × W pixels in, S pixels a side out, K random numbers per
picture, T tries of a crop.
"""

import math
from itertools import permutations
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from clipkit.config import Config
from clipkit_data.keyed import Purpose, keyed_uniforms
from clipkit_data.pictures.crop import crop_boxes
from clipkit_data.pictures.pixels import Blend, blur, colour, column, crop, turn

Share = Annotated[float, Field(ge=0, lt=1)]
Chance = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Range = tuple[Positive, Positive]
_WHOLE = (1.0, 1.0)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)

# Which column of the drawn numbers is for what. New uses get new columns: recipes keep their numbers.
_ANGLE, _SHEAR, _ZOOM, _AREA, _ASPECT, _FLIP, _LEFT, _SHIFT_X, _TOP, _SHIFT_Y = range(10)
_COLOURS, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _SOLARIZE, _RETRIES = slice(10, 14), *range(14, 21)
_TRIES = 10
_DRAWS = _RETRIES + 2 * (_TRIES - 1)

# Values handled at once: what a CPU's cache holds, or enough to fill a GPU without filling its memory.
_AT_ONCE_CPU, _AT_ONCE = 1 << 19, 1 << 26


class AugmentConfig(Config):
    """How strongly pictures are changed; what is not given is off.

    Args:
        crop: Share of the area that may be cut away: short for an area of (1 − crop, 1).
        crop_aspect: Short for an aspect of (1/(1 + a), 1 + a).
        area: Smallest and largest area of a crop, as a share of the picture's; uniform.
        aspect: Least and greatest width/height of a crop; log-uniform. A crop that does not fit is drawn
            again, ten times at most, then the whole picture is taken.
        square: The largest square that fits, at a random place, in place of a crop by area.
        interpolation: How crops are resized, always with antialiasing: "bilinear" or "bicubic".
        flip: Probability of mirroring left and right. Leave it off where captions say left or right.
        rotate: Largest angle, degrees.
        scale: Sizes change by a factor log-uniform in [1/(1 + s), 1 + s].
        translate: Largest shift, as a share of the side.
        shear: Largest shear angle, degrees.
        jitter_p: Probability of brightness, contrast, saturation and hue together, in a random order.
        brightness, contrast, saturation: Factors uniform in [max(0, 1 − x), 1 + x].
        hue: Largest turn of the hue, as a share of the circle; at most 0.5.
        grayscale: Probability of losing the colours.
        grayscale_first: Lose the colours before the jitter, which then finds no saturation and hue.
        blur: Probability of a Gaussian blur.
        blur_sigma: Its standard deviation is uniform in this range, pixels.
        blur_kernel: Its width, pixels, odd; 0 is a tenth of the side.
        solarize: Probability of inverting the levels that are at least `solarize_threshold`.
        solarize_threshold: A level, 0 … 255.
    """

    crop: Share = 0.0
    crop_aspect: Size = 0.0
    area: Range = _WHOLE
    aspect: Range = _WHOLE
    square: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: Chance = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    scale: Size = 0.0
    translate: Share = 0.0
    shear: Annotated[float, Field(ge=0, lt=80)] = 0.0
    jitter_p: Chance = 1.0
    brightness: Size = 0.0
    contrast: Size = 0.0
    saturation: Size = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grayscale: Chance = 0.0
    grayscale_first: bool = False
    blur: Chance = 0.0
    blur_sigma: Range = (0.1, 2.0)
    blur_kernel: Annotated[int, Field(ge=0)] = 0
    solarize: Chance = 0.0
    solarize_threshold: Annotated[int, Field(ge=0, le=255)] = 128

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("area", "aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (smallest, largest), got ({low:g}, {high:g})")
        if self.area[1] > 1:
            raise ValueError("area is a share of the picture's area: at most 1")
        if (self.crop and self.area != _WHOLE) or (self.crop_aspect and self.aspect != _WHOLE):
            raise ValueError("crop and crop_aspect are short for area and aspect: give one of each")
        if self.square and self.crops:
            raise ValueError("square takes the place of crop, crop_aspect, area and aspect")
        if self.blur_kernel and self.blur_kernel % 2 == 0:
            raise ValueError("blur_kernel must be odd, or 0 for a tenth of the side")
        return self

    @property
    def crop_area(self) -> tuple[float, float]:
        """Smallest and largest area of a crop, as a share."""
        return (1 - self.crop, 1.0) if self.crop else self.area

    @property
    def crop_ratio(self) -> tuple[float, float]:
        """Least and greatest width/height of a crop."""
        return (1 / (1 + self.crop_aspect), 1 + self.crop_aspect) if self.crop_aspect else self.aspect

    @property
    def turns(self) -> bool:
        """Whether the affine map is anything but the identity."""
        return any((self.rotate, self.scale, self.translate, self.shear))

    @property
    def crops(self) -> bool:
        """Whether crops are drawn by area and aspect."""
        return self.crop_area != _WHOLE or self.crop_ratio != _WHOLE

    @property
    def moves(self) -> bool:
        """Whether pixels change place."""
        return self.turns or self.crops or self.square or self.flip > 0

    @property
    def jitters(self) -> bool:
        """Whether brightness, contrast, saturation or hue change."""
        return self.jitter_p > 0 and any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def colours(self) -> bool:
        """Whether pixels change colour."""
        return self.jitters or any((self.grayscale, self.blur, self.solarize))


def augment(
    images_N3HW: Tensor,
    config: AugmentConfig,
    *,
    seed: int,
    epoch_N: np.ndarray,
    id_N: np.ndarray,
    view: int = 0,
    size: int | None = None,
    ratio_N: np.ndarray | None = None,
) -> Tensor:
    """The pictures, each changed at random as (seed, epoch, sample id, view) says.

    Args:
        images_N3HW: uint8 (N, 3, H, W), or clips (N, F, 3, H, W), on any device.
        config: How strongly.
        seed: The run's seed.
        epoch_N: Epoch of each picture, integers (N,).
        id_N: Sample id of each picture, integers (N,).
        view: Which view of the sample, at least 0; views of a sample are drawn independently.
        size: Side S of the square pictures that come out; None keeps H × W.
        ratio_N: Width / height of each picture before it was squashed to H × W, float (N,). Crops are then
            drawn of the picture as it was, and it is not squashed in what comes out. Not for clips, nor
            together with an affine map.

    Returns:
        uint8 (N, 3, S, S) or (N, 3, H, W), clips with their F frames, on the same device; what a picture does
        not cover is white.
    """
    if images_N3HW.ndim == 5:  # the key of its clip draws the same numbers for each frame
        clips, frames = images_N3HW.shape[:2]
        keys = {"epoch_N": np.repeat(epoch_N, frames), "id_N": np.repeat(id_N, frames)}
        images_M3HW = augment(images_N3HW.flatten(0, 1), config, seed=seed, view=view, size=size, **keys)
        return images_M3HW.unflatten(0, (clips, frames))
    height, width = (size, size) if size else images_N3HW.shape[-2:]
    if not len(images_N3HW):
        return images_N3HW.new_empty(0, 3, height, width)
    same = (height, width) == images_N3HW.shape[-2:] and ratio_N is None
    if same and not (config.moves or config.colours):
        return images_N3HW
    assert ratio_N is None or not config.turns
    uniform_NK = keyed_uniforms(seed, Purpose.AUGMENT, epoch_N, id_N, _DRAWS, view=view)
    at_once = _AT_ONCE_CPU if images_N3HW.device.type == "cpu" else _AT_ONCE
    at_once = max(1, at_once // images_N3HW[0].numel())
    parts = []
    for part in (slice(i, i + at_once) for i in range(0, len(images_N3HW), at_once)):
        ratio_n = None if ratio_N is None else ratio_N[part]
        parts.append(_steps(images_N3HW[part], config, uniform_NK[part], height, width, ratio_n))
    return torch.cat(parts)


def _steps(
    images: Tensor, config: AugmentConfig, uniform_NK: np.ndarray, height: int, width: int,
    ratio_N: np.ndarray | None,
) -> Tensor:  # fmt: skip
    """A part of the batch through all steps: uint8 in, uint8 (N, 3, height, width) out."""
    if config.turns:
        images = turn(images, _affine(uniform_NK, config))
    if config.crops or config.square or ratio_N is not None or (height, width) != images.shape[-2:]:
        boxes_N4 = _boxes(uniform_NK, config, images.shape[-2], images.shape[-1], ratio_N)
        pixels = images if images.device.type == "cpu" else images.to(torch.float32)  # CPUs resize bytes
        images = crop(pixels, boxes_N4, height, width, config.interpolation)
    if config.flip:
        mirrored_N111 = column(uniform_NK[:, _FLIP] < config.flip, images.device)
        images = torch.where(mirrored_N111, images.flip(-1), images)
    if config.jitters or config.grayscale or config.blur:
        pixels = colour(images.to(torch.float32), _blends(uniform_NK, config))
        pixels = blur(pixels, *_sigmas(uniform_NK, config), config.blur_kernel)
        images = pixels.round_().to(torch.uint8)
    if config.solarize:
        solarized_N111 = column(uniform_NK[:, _SOLARIZE] < config.solarize, images.device)
        images = torch.where(solarized_N111 & (images >= config.solarize_threshold), 255 - images, images)
    return images


def _affine(uniform_NK: np.ndarray, config: AugmentConfig) -> np.ndarray:
    """For each picture the matrix (2, 3) from output to input coordinates, both in [−1, 1].

    input = Rotation · Shear · Zoom · output + shift
    """
    signed_NK = 2 * uniform_NK - 1
    angle_N = np.radians(config.rotate) * signed_NK[:, _ANGLE]
    shear_N = np.tan(np.radians(config.shear) * signed_NK[:, _SHEAR])
    zoom_N = np.exp(math.log1p(config.scale) * signed_NK[:, _ZOOM])
    cos_N, sin_N = np.cos(angle_N), np.sin(angle_N)
    matrix_N23 = np.empty((len(uniform_NK), 2, 3))
    matrix_N23[:, 0, 0] = cos_N * zoom_N
    matrix_N23[:, 1, 0] = sin_N * zoom_N
    matrix_N23[:, 0, 1] = (cos_N * shear_N - sin_N) * zoom_N
    matrix_N23[:, 1, 1] = (sin_N * shear_N + cos_N) * zoom_N
    # Coordinates span 2, so a share of the side is twice as much here.
    matrix_N23[:, 0, 2] = 2 * config.translate * signed_NK[:, _SHIFT_X]
    matrix_N23[:, 1, 2] = 2 * config.translate * signed_NK[:, _SHIFT_Y]
    return matrix_N23


def _boxes(
    uniform_NK: np.ndarray, config: AugmentConfig, height: int, width: int, ratio_N: np.ndarray | None = None
) -> np.ndarray:
    """Top, left, height and width of each picture's crop, int64 (N, 4)."""
    area_NT = np.concatenate([uniform_NK[:, [_AREA]], uniform_NK[:, _RETRIES::2]], axis=1)
    aspect_NT = np.concatenate([uniform_NK[:, [_ASPECT]], uniform_NK[:, _RETRIES + 1 :: 2]], axis=1)
    squashed_N = np.ones(len(uniform_NK)) if ratio_N is None else ratio_N * height / width
    area: tuple[float | np.ndarray, float | np.ndarray] = config.crop_area
    if config.square:
        ratio_N1 = (squashed_N * width / height)[:, None]
        whole_N1 = np.minimum(ratio_N1, 1 / ratio_N1)
        area = whole_N1, whole_N1
    place_N2 = uniform_NK[:, [_TOP, _LEFT]]
    return crop_boxes(area_NT, aspect_NT, place_N2, area, config.crop_ratio, height, width, squashed_N)


def _blends(uniform_NK: np.ndarray, config: AugmentConfig) -> list[Blend]:
    """Colour jitter in each picture's own order, and the loss of colours."""
    zero_N, all_N = np.zeros(len(uniform_NK)), np.arange(len(uniform_NK))
    strength_4 = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    uniform_N4 = uniform_NK[:, _COLOURS]
    amount_N4 = strength_4 * (2 * uniform_N4 - 1)
    amount_N4 = np.where(strength_4 > 1, (1 + strength_4) * uniform_N4 - 1, amount_N4)  # no factor below 0
    amount_N4[uniform_NK[:, _JITTER] >= config.jitter_p] = 0
    orders = np.array(list(permutations(np.flatnonzero(strength_4))))
    order_N = orders[(uniform_NK[:, _ORDER] * len(orders)).astype(np.int64)]
    steps = []
    for step in range(orders.shape[1]):
        kind_N = order_N[:, step]
        amount_N = amount_N4[all_N, kind_N]
        steps.append(
            Blend(
                own=1 + np.where(kind_N == _HUE, 0, amount_N),
                grey=np.where(kind_N == _SATURATION, -amount_N, 0),
                mean=np.where(kind_N == _CONTRAST, -amount_N, 0),
                hue=np.where(kind_N == _HUE, amount_N, 0),
            )
        )
    grey_N = (uniform_NK[:, _GREY] < config.grayscale).astype(np.float64)
    steps.insert(0 if config.grayscale_first else len(steps), Blend(1 - grey_N, grey_N, zero_N, zero_N))
    return steps


def _sigmas(uniform_NK: np.ndarray, config: AugmentConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures are blurred, int64 (n,), and the standard deviation of each, (n,)."""
    blurred = np.flatnonzero(uniform_NK[:, _BLUR] < config.blur)
    low, high = config.blur_sigma
    return blurred, low + (high - low) * uniform_NK[blurred, _SIGMA]
