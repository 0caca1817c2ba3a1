"""`Encoder`: one tower on its own, for what is trained without a second side.

Contrastive methods on pictures, sentences or graphs alone leave a tower behind whose features are the
representation: nothing is projected or normalised. As with `DualEncoder`, what the weights mean depends on
how inputs reach them, so preprocessing and tokenizer belong to the model and to its fingerprint.

Shapes: N inputs, S picture side, L tokens, D features.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.images import Preprocess
from clipkit.models.fingerprint import Fingerprint
from clipkit.text import Tokenizer, trim

Modality = Literal["image", "text", "graph"]


class EncoderConfig(Config):
    """All that is needed to build an encoder without its weights.

    Args:
        modality: What it encodes: "image", "text" or "graph".
        tower: `{"name": …, options…}` of a tower of that modality; see `clipkit.models.towers`.
        preprocess: What an image tower wants to see.
        tokenizer: Of a text tower, `{"name": …, options…}`; see `clipkit.text`.
    """

    modality: Modality = "image"
    tower: dict[str, Any]
    preprocess: Preprocess = Preprocess()
    tokenizer: dict[str, Any] = Field(default_factory=lambda: {"name": "clip"})


class Encoder(nn.Module):
    """One tower with what belongs to it.

    Args:
        tower: Maps normalised pixels (N, 3, S, S), token ids (N, L) or a `torch_geometric` batch of graphs to
            (N, `tower.width`).
        config: The configuration that describes it.
        tokenizer: A text tower's; None for the others.

    Attributes:
        dim: D, the width of the features.
    """

    def __init__(self, tower: nn.Module, config: EncoderConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.modality: Modality = config.modality
        self.preprocess = config.preprocess
        self.tokenizer = tokenizer
        self.tower = tower
        self.dim = int(getattr(tower, "width"))  # noqa: B009
        mean, std = config.preprocess.statistics()
        self.pixel_mean = nn.Buffer(mean, persistent=False)
        self.pixel_std = nn.Buffer(std, persistent=False)
        # Convolutions are faster where a pixel's channels lie side by side; GroupNorm is slower by more.
        batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
        self._layout = torch.channels_last if batch_norm else torch.contiguous_format
        self._fingerprint = Fingerprint()

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.pixel_mean.device

    def encode(self, inputs: Any) -> Tensor:
        """Features as the tower gives them, fp32 (N, D).

        Args:
            inputs: Pictures (N, 3, S, S), normalised floats or uint8 as `preprocess.uint8` gives them; token
                ids int64 (N, L), whose padding is cut off on the CPU; or a `torch_geometric` batch.
        """
        if self.modality == "image" and inputs.dtype == torch.uint8:
            inputs = (inputs.to(torch.float32) / 255 - self.pixel_mean) / self.pixel_std
            if inputs.ndim == 4:  # not the frames of clips
                inputs = inputs.contiguous(memory_format=self._layout)
        elif self.modality == "text" and inputs.device.type == "cpu":
            inputs = self.trim(inputs)
        return self.tower(inputs).float()

    forward = encode

    def embed(self, inputs: Any) -> Tensor:
        """Features scaled to length 1, fp32 (N, D); inputs as in `encode`."""
        return F.normalize(self.encode(inputs), dim=-1)

    def trim(self, ids_NL: Tensor) -> Tensor:
        """`ids_NL` without trailing columns of padding, where the tower's result does not need them."""
        if self.tokenizer is None or not self.trimmable:
            return ids_NL
        return trim(ids_NL, self.tokenizer.pad_id)

    @property
    def trimmable(self) -> bool:
        """Whether a text tower's result needs no padding."""
        return getattr(self.tower, "trimmable", False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over weights, tower, preprocessing and tokenizer: equal for equal features."""
        meaning: dict[str, Any] = {"modality": self.modality, "tower": self.config.tower}
        if self.modality == "image":
            meaning["preprocess"] = self.preprocess.model_dump(mode="json")
        if self.tokenizer is not None:
            meaning["tokenizer"] = self.tokenizer.identity()
        return self._fingerprint.of(self.state_dict(), meaning)
