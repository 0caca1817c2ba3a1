"""`DualEncoder`: two towers, two linear projections, one space.

An image tower and a text tower of any widths are projected without bias to one dimension and L2-normalised
in fp32; a learnable temperature (and for SigLIP a bias) turns cosines into logits. What the weights mean
depends on how pictures and texts reach them, so the model carries its preprocessing and its tokenizer, and
its fingerprint covers all of it.

    logit = exp(log_scale) · cos(image, text) + bias

Shapes: N pictures or texts, S picture side, L tokens, D embedding dimension.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.images import Preprocess
from clipkit.models.fingerprint import Fingerprint
from clipkit.text import Tokenizer, trim

Scoring = Literal["softmax", "sigmoid"]

MAX_LOG_SCALE = math.log(100)
CLIP_SCALE = 1 / 0.07
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0


class ModelConfig(Config):
    """All that is needed to build a model without its weights.

    Args:
        image, text: `{"name": …, options…}` of a tower; see `clipkit.models.towers`.
        dim: Embedding dimension D; None when both towers already end in one of the same width.
        preprocess: What the image tower wants to see.
        tokenizer: `{"name": …, options…}`; see `clipkit.text`.
        scoring: How logits become probabilities: "softmax" (CLIP) or "sigmoid" (SigLIP).
        init_scale, init_bias: Initial logit scale and bias; by default 1/0.07 and none for "softmax",
            10 and −10 for "sigmoid".
    """

    image: dict[str, Any]
    text: dict[str, Any]
    dim: Annotated[int, Field(ge=1)] | None = 512
    preprocess: Preprocess = Preprocess()
    tokenizer: dict[str, Any] = Field(default_factory=lambda: {"name": "clip"})
    scoring: Scoring = "softmax"
    init_scale: Annotated[float, Field(gt=0)] | None = None
    init_bias: float | None = None


class DualEncoder(nn.Module):
    """An image tower and a text tower that embed into one space.

    Args:
        image: Maps normalised pixels (N, 3, S, S) to (N, `image.width`).
        text: Maps ids (N, L) to (N, `text.width`); `text.trimmable` says that padding may be cut off.
        config: The configuration that describes the towers; `dim`, `scoring` and the initial scale and
            bias are taken from it.
        tokenizer: The text tower's tokenizer.
    """

    def __init__(self, image: nn.Module, text: nn.Module, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.preprocess = config.preprocess
        self.tokenizer = tokenizer
        self.scoring: Scoring = config.scoring
        self.image = image
        self.text = text
        image_width, text_width = int(getattr(image, "width")), int(getattr(text, "width"))  # noqa: B009
        if config.dim is None and image_width != text_width:
            raise ValueError(
                f"dim: the towers have widths {image_width} and {text_width}; give one to project to"
            )
        self.dim = config.dim if config.dim is not None else image_width
        self.image_projection = _projection(image, image_width, config.dim)
        self.text_projection = _projection(text, text_width, config.dim)
        sigmoid = config.scoring == "sigmoid"
        scale = config.init_scale or (SIGLIP_SCALE if sigmoid else CLIP_SCALE)
        bias = SIGLIP_BIAS if sigmoid and config.init_bias is None else config.init_bias
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float32))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias, dtype=torch.float32))
        mean, std = config.preprocess.statistics()
        self.pixel_mean = nn.Buffer(mean, persistent=False)
        self.pixel_std = nn.Buffer(std, persistent=False)
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return self.log_scale.device

    def encode_image(self, pixels_N3SS: Tensor) -> Tensor:
        """L2-normalised embeddings of pictures, fp32 (N, D).

        Args:
            pixels_N3SS: Normalised floats, or uint8 as `preprocess.uint8` gives it, which is normalised here.
        """
        if pixels_N3SS.dtype == torch.uint8:
            pixels_N3SS = (pixels_N3SS.to(torch.float32) / 255 - self.pixel_mean) / self.pixel_std
        return _unit(self.image_projection(self.image(pixels_N3SS)))

    def encode_text(self, ids_NL: Tensor) -> Tensor:
        """L2-normalised embeddings of texts, fp32 (N, D).

        Args:
            ids_NL: Token ids, int64. Padding is cut off where that is exact and costs nothing, that is on
                the CPU: on a GPU it would wait for the device, so trim before moving (`tokenize` does).
        """
        if ids_NL.device.type == "cpu":
            ids_NL = self.trim(ids_NL)
        return _unit(self.text_projection(self.text(ids_NL)))

    def forward(self, pixels_N3SS: Tensor, ids_NL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Embeddings of pictures and texts (N, D) each, logit scale, and bias if there is one, all fp32."""
        image_ND = self.encode_image(pixels_N3SS)
        text_ND = self.encode_text(ids_NL)
        bias = None if self.bias is None else self.bias.float()
        return image_ND, text_ND, self.scale, bias

    @property
    def scale(self) -> Tensor:
        """The logit scale exp(log_scale) = 1/τ, an fp32 scalar."""
        return self.log_scale.float().exp()

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Keep log_scale in [0, ln 100]; call it after each optimizer step.

        References: Radford et al. 2021, section 2.5.
        """
        self.log_scale.clamp_(0, MAX_LOG_SCALE)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids of texts, int64 (N, l) on the CPU, trimmed where the text tower allows it."""
        return self.trim(self.tokenizer.encode(texts))

    def trim(self, ids_NL: Tensor) -> Tensor:
        """`ids_NL` without trailing columns of padding, where the text tower's result does not need them."""
        return trim(ids_NL, self.tokenizer.pad_id) if self.trimmable else ids_NL

    @property
    def trimmable(self) -> bool:
        """Whether the text tower's result needs no padding."""
        return getattr(self.text, "trimmable", False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, preprocessing, tokenizer and scoring: equal for equal embeddings."""
        return self._fingerprint.of(
            self.state_dict(),
            {
                "preprocess": self.preprocess.model_dump(mode="json"),
                "tokenizer": self.tokenizer.identity(),
                "scoring": self.scoring,
            },
        )


def _projection(tower: nn.Module, width: int, dim: int | None) -> nn.Module:
    """A linear map without bias to `dim`; none where the tower itself ends in a projection of that width.

    Its standard deviation width^-½ keeps the norm of the features.
    """
    if dim is None or (width == dim and getattr(tower, "projects", False)):
        return nn.Identity()
    projection = nn.Linear(width, dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _unit(features_ND: Tensor) -> Tensor:
    """Rows scaled to length 1 in fp32; a zero row stays zero."""
    return F.normalize(features_ND.float(), dim=-1)
