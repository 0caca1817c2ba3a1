"""transformers' vision and text models as towers.

A tower is the library's own model, a rule for pooling its tokens, and for CLIP's kind its projection. CLIP's
and SigLIP's text models pool by themselves and were trained without an attention mask; every other text
model gets one. The options hold the model's whole configuration, so that a saved tower is built again
without its name.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ArtifactError, ClipkitError, ConfigError, DependencyError, NotFoundError
from clipkit.text import Tokenizer

Pooling = Literal["auto", "pooler", "cls", "mean", "last"]

# Halves of two-tower models, which transformers' AutoModel does not all know by their configuration.
_CLASSES = {
    "chinese_clip_text_model": "ChineseCLIPTextModel",
    "chinese_clip_vision_model": "ChineseCLIPVisionModel",
    "clip_text_model": "CLIPTextModel",
    "clip_vision_model": "CLIPVisionModel",
    "metaclip_2_text_model": "MetaClip2TextModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip_vision_model": "SiglipVisionModel",
}
_CAUSAL = ("clip_text_model", "metaclip_2_text_model")
_POOLED_WITHOUT_MASK = (*_CAUSAL, "siglip_text_model")
_FORGOTTEN = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


class HFImageConfig(Config):
    """A vision model of transformers, by `model` (name or folder) or by its full `config`.

    Args:
        pretrained: Start from the weights of `model`; a saved model has its own.
        pooling: "pooler" (the model's own), "cls", "mean"; "auto" is the model's own, else "cls".
        projection: Width of CLIP's own linear projection after the pooling, if the tower has one.
    """

    model: str | None = None
    pretrained: bool = False
    config: dict[str, Any]
    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    projection: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _look_up(cls, data: Any) -> Any:
        return _with_config(data, "vision_config")


class HFTextConfig(Config):
    """A text model of transformers, by `model` (name or folder) or by its full `config`.

    Args:
        pretrained: Start from the weights of `model`; a saved model has its own.
        pooling: "pooler" (the model's own), "cls", "mean", "last"; "auto" is the model's own for CLIP's and
            SigLIP's kind, else "mean".
        projection: Width of CLIP's own linear projection after the pooling, if the tower has one.
    """

    model: str | None = None
    pretrained: bool = False
    config: dict[str, Any]
    pooling: Pooling = "auto"
    projection: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _look_up(cls, data: Any) -> Any:
        return _with_config(data, "text_config")


class HFImage(nn.Module):
    """A transformers vision model, pooled and for CLIP's kind projected."""

    def __init__(self, trunk: nn.Module, pooling: Pooling, projection: nn.Module | None, size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.pooling: Pooling = pooling
        self.projection = projection
        self.projects = projection is not None
        self.width = _measured_width(self, torch.zeros(1, 3, size, size))

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        output = self.trunk(pixel_values=pixels_N3SS)
        pooled = getattr(output, "pooler_output", None) if self.pooling in ("auto", "pooler") else None
        if pooled is None:
            if self.pooling == "pooler":
                raise ValueError("the vision model has no pooled output: choose pooling cls or mean")
            states = output.last_hidden_state
            pooled = states.mean(dim=1) if self.pooling == "mean" else states[:, 0]
        pooled = pooled.flatten(1)
        return pooled if self.projection is None else self.projection(pooled)


class HFText(nn.Module):
    """A transformers text model, pooled and for CLIP's kind projected."""

    def __init__(
        self, trunk: nn.Module, pooling: Pooling, projection: nn.Module | None, *, eos_id: int, pad_id: int
    ) -> None:
        super().__init__()
        kind = getattr(trunk.config, "model_type", "")
        self.trunk = trunk
        self.masked = kind not in _POOLED_WITHOUT_MASK
        if pooling == "auto":
            pooling = "mean" if self.masked else "pooler"
        self.pooling: Pooling = pooling
        self.projection = projection
        self.projects = projection is not None or kind == "siglip_text_model"
        self.trimmable = self.masked or kind in _CAUSAL
        self.eos_id, self.pad_id = eos_id, pad_id
        self.width = _measured_width(self, torch.tensor([[eos_id, pad_id]]))

    def forward(self, ids_NL: Tensor) -> Tensor:
        mask_NL = self._mask(ids_NL)
        output = self.trunk(input_ids=ids_NL, attention_mask=mask_NL if self.masked else None)
        pooled = self._pool(output, mask_NL)
        return pooled if self.projection is None else self.projection(pooled)

    def _mask(self, ids_NL: Tensor) -> Tensor:
        """1 for tokens, 0 for padding; where padding is the end token itself, the first one counts."""
        if self.eos_id != self.pad_id:
            return (ids_NL != self.pad_id).long()
        ended_NL = (ids_NL == self.eos_id).long().cumsum(dim=1)
        return ((ended_NL == 0) | ((ended_NL == 1) & (ids_NL == self.eos_id))).long()

    def _pool(self, output: Any, mask_NL: Tensor) -> Tensor:
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ValueError("the text model has no pooled output: choose pooling cls, mean or last")
            return output.pooler_output
        states_NLW = output.last_hidden_state
        if self.pooling == "cls":
            return states_NLW[:, 0]
        if self.pooling == "last":
            last_N = (mask_NL.sum(dim=1) - 1).clamp(min=0)
            return states_NLW[torch.arange(len(last_N), device=last_N.device), last_N]
        weights_NL1 = mask_NL.unsqueeze(-1).to(states_NLW.dtype)
        return (states_NLW * weights_NL1).sum(dim=1) / weights_NL1.sum(dim=1).clamp(min=1)


def build_hf_image(config: HFImageConfig, image_size: int) -> HFImage:
    """A transformers image tower. Raises: ConfigError where it takes pictures of another size."""
    expected = config.config.get("image_size", image_size)
    sides = {expected} if isinstance(expected, int) else set(expected)
    if sides != {image_size}:
        raise ConfigError(f"the vision model takes pictures of {expected} pixels, not {image_size}")
    trunk = _trunk(config)
    return HFImage(trunk, config.pooling, _linear(trunk, config.projection), image_size)


def build_hf_text(config: HFTextConfig, tokenizer: Tokenizer) -> HFText:
    """A transformers text tower. Raises: ConfigError where the tokenizer does not fit it."""
    for ours, key, what in (
        (tokenizer.vocab_size, "vocab_size", "known tokens"),
        (tokenizer.context_length, "max_position_embeddings", "tokens of context"),
    ):
        theirs = config.config.get(key)
        if isinstance(theirs, int) and ours > theirs:
            raise ConfigError(f"the text model has {theirs} {what}, the tokenizer {ours}")
    trunk = _trunk(config)
    projection = _linear(trunk, config.projection)
    return HFText(trunk, config.pooling, projection, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)


def _trunk(config: HFImageConfig | HFTextConfig) -> nn.Module:
    """The library's model, with new or pretrained weights."""
    import transformers

    options = dict(config.config)
    settings = transformers.AutoConfig.for_model(options.pop("model_type", ""), **options)
    name = _CLASSES.get(settings.model_type)
    family: Any = getattr(transformers, name) if name else transformers.AutoModel
    concrete = family if name else transformers.MODEL_MAPPING.get(type(settings), None)
    if isinstance(concrete, tuple):
        concrete = concrete[0]
    # a pooler that nothing reads would get no gradient, which distributed training does not accept
    pools = config.pooling == "pooler" or (config.pooling == "auto" and isinstance(config, HFImageConfig))
    accepts = concrete is not None and "add_pooling_layer" in inspect.signature(concrete.__init__).parameters
    extra = {"add_pooling_layer": pools} if accepts else {}
    source = config.model if config.pretrained and config.model else settings.model_type
    with transformers_errors(source):
        if config.pretrained:
            trunk = family.from_pretrained(config.model, dtype=torch.float32, **extra)
        elif name:
            trunk = family(settings, **extra)
        else:
            trunk = family.from_config(settings, **extra)
    encoder = getattr(trunk, "get_encoder", None)
    return encoder() if settings.is_encoder_decoder and encoder else trunk


def _linear(trunk: nn.Module, width: int | None) -> nn.Module | None:
    if width is None:
        return None
    hidden = int(trunk.config.hidden_size)  # pyright: ignore
    projection = nn.Linear(hidden, width, bias=False)
    nn.init.normal_(projection.weight, std=hidden**-0.5)
    return projection


@torch.no_grad()
def _measured_width(tower: nn.Module, example: Tensor) -> int:
    """The width of a tower's features, from a dry run."""
    was_training = tower.training
    width = tower.eval()(example).shape[-1]
    tower.train(was_training)
    return int(width)


def portable_config(settings: Any) -> dict[str, Any]:
    """A transformers configuration as plain JSON, without traces of where it came from."""
    options = json.loads(settings.to_json_string(use_diff=False))
    return {key: value for key, value in options.items() if key not in _FORGOTTEN}


def _with_config(data: Any, part: str) -> Any:
    """Options with the configuration of the named model filled in."""
    if not isinstance(data, dict) or data.get("config") is not None or not isinstance(data.get("model"), str):
        return data
    import transformers

    with transformers_errors(data["model"]):
        settings = transformers.AutoConfig.from_pretrained(data["model"], trust_remote_code=False)
    return {**data, "config": portable_config(getattr(settings, part, settings))}


@contextmanager
def transformers_errors(source: str) -> Iterator[None]:
    """Run transformers without its progress bars and reports, and turn its failures into ours."""
    from transformers.utils import logging

    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().is_dir():
        raise NotFoundError(f"no such folder: {source}")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except ClipkitError:
        raise
    except ImportError as error:
        raise DependencyError(f"{source!r} needs a package: {_one_line(error)}") from error
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(f"{source!r} cannot be loaded: {_one_line(error)}") from error
    except OSError as error:
        raise DependencyError(
            f"cannot find or download {source!r}: {_one_line(error)}",
            hint="without a network, give a folder that holds the model's files",
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
