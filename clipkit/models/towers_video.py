"""The tower `frames`: a clip as its frames, each through an image tower, brought together over time.

Any image tower can be given. The mean of the frames' features has no parameters and no sense of time: a clip
and the same clip backwards are one. "attention" adds what a frame sees of the others: a small transformer
over the features and the places of their frames, whose answer is added to them before the mean.

Shapes: N clips, F frames, S picture side, D width of the image tower's features.

References: Luo et al. 2022, "CLIP4Clip: an empirical study of CLIP for end to end video clip retrieval and
captioning", section 3.3 ("parameter-free" and "sequential" type).
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import InputError

_HEAD = 64


class FramesConfig(Config):
    """Options of the tower for clips.

    Args:
        image: `{"name": …, options…}` of the image tower that sees each frame.
        pool: "mean", or "attention", which knows the order of the frames.
        frames: F, frames of a clip.
        layers, heads: Of the transformer of "attention"; by default one head per 64 features.
    """

    image: dict[str, Any]
    pool: Literal["mean", "attention"] = "mean"
    frames: int = Field(default=8, ge=1)
    layers: int = Field(default=1, ge=1)
    heads: int | None = Field(default=None, ge=1)


class FrameAttention(nn.Module):
    """Features of a clip's frames to one: x + transformer(x + place), its mean over time.

    Args:
        width: D; a multiple of `heads`.
        frames: F.
    """

    def __init__(self, width: int, frames: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: the features' width {width} is not a multiple of {heads}")
        self.place_FD = nn.Parameter(torch.empty(frames, width))
        nn.init.normal_(self.place_FD, std=width**-0.5)
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, **options) for _ in range(layers))
        )

    def forward(self, features_NFD: Tensor) -> Tensor:
        """(N, F, D) to (N, D)."""
        return (features_NFD + self.blocks(features_NFD + self.place_FD)).mean(dim=1)


class Frames(nn.Module):
    """Clips (N, F, 3, S, S) to (N, width); a picture (N, 3, S, S) is a clip that stands still.

    Args:
        image: The tower that sees each frame.
        image_options: Its complete options.
        config: Its `image` is not read.
    """

    def __init__(self, image: nn.Module, image_options: dict[str, Any], config: FramesConfig) -> None:
        super().__init__()
        self.image, self.frames = image, config.frames
        self.width = int(getattr(image, "width"))  # noqa: B009
        self.completed = {"image": image_options}
        heads = config.heads or max(1, self.width // _HEAD)
        self.pool = (
            FrameAttention(self.width, config.frames, config.layers, heads)
            if config.pool == "attention"
            else None
        )
        # the mean of projections is the projection of the mean
        self.projects = self.pool is None and bool(getattr(image, "projects", False))

    def forward(self, pixels_NF3SS: Tensor) -> Tensor:
        """Features (N, D).

        Args:
            pixels_NF3SS: Normalised clips of F frames, or pictures (N, 3, S, S).

        Raises:
            InputError: The clips have another number of frames.
        """
        if pixels_NF3SS.ndim == 4:
            features_NFD = self.image(pixels_NF3SS)[:, None].expand(-1, self.frames, -1)
        elif pixels_NF3SS.shape[1] != self.frames:
            raise InputError(
                f"the tower takes clips of {self.frames} frames, got {pixels_NF3SS.shape[1]}",
                hint="read them with Clips(preprocess, frames)",
            )
        else:
            clips = pixels_NF3SS.shape[:2]
            features_NFD = self.image(pixels_NF3SS.flatten(0, 1)).unflatten(0, clips)
        return features_NFD.mean(dim=1) if self.pool is None else self.pool(features_NFD)


def build_frames(config: FramesConfig, image_size: int) -> Frames:
    """The tower for clips of pictures of `image_size` pixels. Raises: as the image tower's build."""
    from clipkit.models.towers import IMAGE_TOWERS, build_tower  # the table that this tower stands in

    image, options = build_tower(IMAGE_TOWERS, config.image, image_size)
    return Frames(image, options, config)
