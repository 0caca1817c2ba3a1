"""What is done to the pixels of a batch, each picture with its own numbers: turn, crop, colour, blur.

Every function treats a picture the same whatever else is in the batch, bit by bit: sums run element by
element or over integers, since a batched product or mean may round differently for another N.

Shapes: N pictures, H × W pixels, n pictures that are blurred, R radius of a blur.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


def column(value_N: np.ndarray, device: torch.device) -> Tensor:
    """One number per picture as (N, 1, 1, 1): float64 becomes float32."""
    value_N = value_N.astype(np.float32) if value_N.dtype == np.float64 else value_N
    return torch.from_numpy(value_N).to(device)[:, None, None, None]


def turn(images_N3HW: Tensor, matrix_N23: np.ndarray) -> Tensor:
    """The pictures resampled (bilinear) where the matrices say.

    The grid is built element by element: a batched matrix product may round differently for another N.
    """
    height, width = images_N3HW.shape[-2:]
    x_W, y_H = (
        ((torch.arange(side, dtype=torch.float32, device=images_N3HW.device) + 0.5) * 2 - side) / side
        for side in (width, height)
    )
    matrix = torch.from_numpy(matrix_N23.astype(np.float32)).to(images_N3HW.device)[:, :, :, None, None]
    x_W, y_H = x_W[None, None, :], y_H[None, :, None]
    # An angle is one in pixels, whatever the picture's proportions.
    columns = matrix[:, 0, 0] * x_W + matrix[:, 0, 1] * (height / width) * y_H + matrix[:, 0, 2]
    rows = matrix[:, 1, 0] * (width / height) * x_W + matrix[:, 1, 1] * y_H + matrix[:, 1, 2]
    ink_N3HW = 255 - images_N3HW.to(torch.float32)  # grid_sample fills with 0, and 0 ink is white
    moved_N3HW = F.grid_sample(
        ink_N3HW, torch.stack([columns, rows], dim=-1), mode="bilinear", align_corners=False
    )
    return (255 - moved_N3HW).round_().clamp_(0, 255).to(torch.uint8)


def crop(pixels_N3HW: Tensor, boxes_N4: np.ndarray, height: int, width: int, interpolation: str) -> Tensor:
    """The boxes of uint8 or float32 pictures, resized with antialiasing to uint8 (N, 3, height, width)."""
    resized = []
    for i, (top, left, high, wide) in enumerate(boxes_N4.tolist()):
        box = pixels_N3HW[i : i + 1, :, top : top + high, left : left + wide]
        if box.is_floating_point() and interpolation == "bicubic":
            # Bytes are cut to [0, 255] between rows and columns; floats, uncut, can end 20 levels away.
            box = F.interpolate(box, (high, width), mode=interpolation, antialias=True)
            box = box.round_().clamp_(0, 255)
        resized.append(F.interpolate(box, (height, width), mode=interpolation, antialias=True))
    pixels = torch.cat(resized)
    return pixels.round_().clamp_(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels


class Blend(NamedTuple):
    """One step of colour per picture: own · x + grey · grey(x) + mean · mean grey(x), then a turn of the hue.

    Args:
        own, grey, mean: Weights that add up to 1, or to the brightness; (N,) each.
        hue: Turn of the hue in circles, (N,); 0 leaves it.
    """

    own: np.ndarray
    grey: np.ndarray
    mean: np.ndarray
    hue: np.ndarray


def colour(pixels_N3HW: Tensor, steps: list[Blend]) -> Tensor:
    """float32 pixels in [0, 255] through the steps, cut to [0, 255] after each."""
    for own_N, grey_N, mean_N, hue_N in steps:
        own, grey, mean = (column(part_N, pixels_N3HW.device) for part_N in (own_N, grey_N, mean_N))
        if grey_N.any() or mean_N.any():
            luma_N1HW = _luma(pixels_N3HW)
            # Sums of 256ths are exact in any order; a mean of floats might differ in its last bit.
            sum_N111 = (luma_N1HW * 256).round_().sum((1, 2, 3), dtype=torch.float64, keepdim=True)
            level_N111 = (sum_N111 / (256 * luma_N1HW[0].numel())).to(torch.float32)
            pixels_N3HW = pixels_N3HW * own + (luma_N1HW * grey + level_N111 * mean)
        elif (own_N != 1).any():
            pixels_N3HW = pixels_N3HW * own
        pixels_N3HW = pixels_N3HW.clamp_(0, 255)
        if hue_N.any():
            turned = np.flatnonzero(hue_N)
            rows = torch.from_numpy(turned).to(pixels_N3HW.device)
            hue = column(hue_N[turned], pixels_N3HW.device)
            pixels_N3HW[rows] = turn_hue(pixels_N3HW[rows], hue)
    return pixels_N3HW


def _luma(pixels_N3HW: Tensor) -> Tensor:
    red, green, blue = pixels_N3HW.split(1, dim=1)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def turn_hue(pixels_N3HW: Tensor, turn_N111: Tensor) -> Tensor:
    """The pixels with another hue, and value and saturation as they were (HSV).

    With hue h in sixths, value v and chroma c, channel n (red 5, green 3, blue 1) is
    v − c · clamp(min(k, 4 − k), 0, 1), where k = (n + h) mod 6.
    """
    red, green, blue = pixels_N3HW.split(1, dim=1)
    low, value = pixels_N3HW.aminmax(dim=1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma == 0, 1, chroma)  # grey has no hue; any will do
    from_red, from_green, from_blue = (green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4
    hue = torch.where(value == red, from_red, torch.where(value == green, from_green, from_blue))
    offset_3 = torch.tensor([5.0, 3.0, 1.0], device=pixels_N3HW.device).view(1, 3, 1, 1)
    k = (hue + turn_N111 * 6 + offset_3).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(pixels_N3HW: Tensor, blurred: np.ndarray, sigma_n: np.ndarray, kernel: int) -> Tensor:
    """Some of the pictures blurred: columns, then rows, mirrored at the border.

    Taps are added one by one: a convolution may sum in another order for another N.
    """
    side = min(pixels_N3HW.shape[-2:])
    radius = min((kernel or side // 10) // 2, side - 1)
    if not len(blurred) or not radius:
        return pixels_N3HW
    weight_nR = np.exp(-0.5 * (np.arange(radius + 1) / sigma_n[:, None]) ** 2)
    weight_nR /= (2 * weight_nR.sum(1) - weight_nR[:, 0])[:, None]
    rows = torch.from_numpy(blurred).to(pixels_N3HW.device)
    weights = [column(weight_n, pixels_N3HW.device) for weight_n in weight_nR.T]
    part = pixels_N3HW[rows]
    for dim, padding in ((-2, (0, 0, radius, radius)), (-1, (radius, radius, 0, 0))):
        length = part.shape[dim]
        padded = F.pad(part, padding, mode="reflect")
        part = padded.narrow(dim, radius, length) * weights[0]
        for i, weight in enumerate(weights[1:], start=1):
            around = padded.narrow(dim, radius - i, length) + padded.narrow(dim, radius + i, length)
            part.add_(around.mul_(weight))
    pixels_N3HW[rows] = part
    return pixels_N3HW
