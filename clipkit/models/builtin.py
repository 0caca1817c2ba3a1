"""The two small towers that ship with clipkit: enough to train an image-text model on a laptop's CPU.

The idea in both is to spend the few operations a CPU has where they count: the image tower folds pixels into
channels before its first convolution and keeps maps small; the text tower is a shallow causal transformer
that reads its answer at the end-of-text token, so that a batch can be trimmed to its longest caption without
changing any result. By default neither uses batch statistics: the gradient of a batch does not depend on how
the batch was cut into ranks.

Shapes: N batch, C channels, H and W pixels, L tokens, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from clipkit.config import Config


class CNNConfig(Config):
    """Options of the built-in image tower.

    Args:
        widths: Channels of each stage; each stage after the first halves the map.
        depths: Residual blocks per stage.
        stem: Side of the square of pixels that the stem folds into channels.
        groups: Groups of the normalisation.
        norm: "group", or "batch", which self-supervised methods want: it needs no groups, but its gradient is
            that of a rank's part of the batch unless it is synchronised.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (1, 1, 1)
    stem: int = Field(default=4, ge=1)
    groups: int = Field(default=8, ge=1)
    norm: Literal["group", "batch"] = "group"

    @model_validator(mode="after")
    def _check(self) -> "CNNConfig":
        if len(self.widths) != len(self.depths) or not self.widths:
            raise ValueError("widths and depths must have one number per stage")
        if any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"each width must be a positive multiple of groups ({self.groups})")
        return self


def _norm(config: CNNConfig, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if config.norm == "batch" else nn.GroupNorm(config.groups, width)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with normalisation and a shortcut (He et al. 2016, pre-add ReLU)."""

    def __init__(self, width_in: int, width: int, stride: int, config: CNNConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = _norm(config, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = _norm(config, width)
        pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        same = stride == 1 and width_in == width
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(pool, nn.Conv2d(width_in, width, 1, bias=False))
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = F.relu(self.norm1(self.conv1(x_NCHW)), inplace=True)
        return F.relu(self.shortcut(x_NCHW) + self.norm2(self.conv2(y_NCHW)))


class ImageCNN(nn.Module):
    """A small residual network: (N, 3, S, S) float to (N, width) float; `width` is the last stage's."""

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        first = config.widths[0]
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(config.stem),
            nn.Conv2d(3 * config.stem**2, first, 3, 1, 1, bias=False),
            _norm(config, first),
            nn.ReLU(inplace=True),
        )
        blocks: list[nn.Module] = []
        width_in = first
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(width_in, width, stride, config))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.width = width_in

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        return self.blocks(self.stem(pixels_NCHW)).mean(dim=(2, 3))


class TextTransformerConfig(Config):
    """Options of the built-in text tower.

    Args:
        width: Of tokens and features.
        layers: Transformer blocks.
        heads: Heads of attention; they divide the width.
        dropout: Share of what each block adds that is left out in training.
        pooling: "end": the state of the end-of-text token; "mean": the mean of all states up to it.
    """

    width: int = Field(default=128, ge=8)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    pooling: Literal["end", "mean"] = "end"

    @model_validator(mode="after")
    def _check(self) -> "TextTransformerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention and a GELU MLP (Radford et al. 2019)."""

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x_NLD: Tensor) -> Tensor:
        count, length, width = x_NLD.shape
        qkv = self.qkv(self.norm1(x_NLD)).view(count, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_NLD = x_NLD + self.drop(self.out(y.transpose(1, 2).reshape(count, length, width)))
        return x_NLD + self.drop(self.mlp(self.norm2(x_NLD)))


class TextTransformer(nn.Module):
    """A shallow causal transformer: (N, L) token ids to (N, width), read up to the end-of-text token.

    Causal attention makes every token after the end-of-text token irrelevant to the result, so ids may be
    trimmed to the longest caption of a batch (`trimmable`), and on a CPU captions of like length run
    together, each group cut to its own longest.
    """

    trimmable = True
    groups = 6

    def __init__(
        self, config: TextTransformerConfig, vocab_size: int, context_length: int, eos_id: int
    ) -> None:
        super().__init__()
        self.eos_id = eos_id
        self.width = config.width
        self.pooling = config.pooling
        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, config.width))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)

    def forward(self, ids_NL: Tensor) -> Tensor:
        x_NLD = self.token_embedding(ids_NL) + self.position_embedding[: ids_NL.shape[1]]
        end_N = (ids_NL == self.eos_id).int().argmax(dim=1)
        if ids_NL.device.type != "cpu":  # lengths of groups would have to be fetched from the device
            return self._read(x_NLD, end_N)
        order_N = end_N.argsort(stable=True)
        read = [
            self._read(x_NLD[part, : int(end_N[part[-1]]) + 1], end_N[part])
            for part in order_N.chunk(self.groups)
        ]
        return torch.cat(read)[order_N.argsort()]

    def _read(self, x_NLD: Tensor, end_N: Tensor) -> Tensor:
        """The features (N, width) of embedded tokens; `end_N` are the places of the end-of-text tokens."""
        for block in self.blocks:
            x_NLD = block(x_NLD)
        if self.pooling == "mean":
            inside_NL = torch.arange(x_NLD.shape[1], device=end_N.device) <= end_N.unsqueeze(1)
            return (self.norm(x_NLD) * inside_NL.unsqueeze(2)).sum(dim=1) / (end_N + 1).unsqueeze(1)
        return self.norm(x_NLD[torch.arange(len(end_N), device=end_N.device), end_N])


def build_cnn(config: CNNConfig, image_size: int) -> ImageCNN:
    """The built-in image tower; `image_size` must be a multiple of the stem."""
    if image_size % config.stem:
        raise ValueError(f"image size {image_size} is not a multiple of the stem {config.stem}")
    return ImageCNN(config)


def build_transformer(
    config: TextTransformerConfig, vocab_size: int, context_length: int, eos_id: int
) -> TextTransformer:
    """The built-in text tower."""
    return TextTransformer(config, vocab_size, context_length, eos_id)
