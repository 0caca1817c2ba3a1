"""open_clip's towers as towers of ours.

Every open_clip model falls into an image tower (`visual`) and a text tower that both end in one dimension.
The options hold open_clip's own configuration mappings, not only a name: a saved model is built without
looking anything up.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from clipkit.config import Config
from clipkit.errors import ConfigError
from clipkit.models.open_clip_weights import create_open_clip, wants_quick_gelu
from clipkit.text import Tokenizer


class OpenClipImageConfig(Config):
    """An image tower of open_clip, by `model` name (and `pretrained` tag) or by its full `vision_cfg`."""

    model: str | None = None
    pretrained: str | None = None
    embed_dim: int
    quick_gelu: bool = False
    vision_cfg: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _look_up(cls, data: Any) -> Any:
        return _with_architecture(data, "vision_cfg")


class OpenClipTextConfig(Config):
    """A text tower of open_clip, by `model` name (and `pretrained` tag) or by its full `text_cfg`.

    `hf_config` is the transformers configuration of a text tower that open_clip takes from there.
    """

    model: str | None = None
    pretrained: str | None = None
    embed_dim: int
    quick_gelu: bool = False
    text_cfg: dict[str, Any]
    hf_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _look_up(cls, data: Any) -> Any:
        return _with_architecture(data, "text_cfg")


class OpenClipImage(nn.Module):
    """open_clip's `visual`, which ends in a projection."""

    projects = True

    def __init__(self, visual: nn.Module, width: int) -> None:
        super().__init__()
        self.visual = visual
        self.width = width

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        return _first(self.visual(pixels_N3SS))


class OpenClipText(nn.Module):
    """open_clip's text tower, which ends in a projection."""

    projects = True

    def __init__(self, text: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = text
        self.width = width
        causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
        self.trimmable = causal and getattr(text, "pool_type", "") in ("argmax", "eos")

    def forward(self, ids_NL: Tensor) -> Tensor:
        if not self.trimmable:
            return _first(self.tower(ids_NL))
        return self._causal(ids_NL)

    def _causal(self, ids_NL: Tensor) -> Tensor:
        """open_clip's own forward pass, whose mask does not follow a shorter batch."""
        from open_clip.transformer import text_global_pool

        tower: Any = self.tower
        length = ids_NL.shape[1]
        kind = tower.transformer.get_cast_dtype()
        x_NLW = tower.token_embedding(ids_NL).to(kind) + tower.positional_embedding[:length].to(kind)
        x_NLW = tower.ln_final(tower.transformer(x_NLW, attn_mask=tower.attn_mask[:length, :length]))
        x_NW = text_global_pool(x_NLW, ids_NL, tower.pool_type, eos_token_id=tower.eos_id)
        projection = tower.text_projection
        if projection is None:
            return x_NW
        return projection(x_NW) if isinstance(projection, nn.Linear) else x_NW @ projection


def build_open_clip_image(config: OpenClipImageConfig, image_size: int) -> OpenClipImage:
    """An open_clip image tower. Raises: ConfigError where it takes pictures of another size."""
    from open_clip.model import _build_vision_tower

    if config.pretrained:
        visual = create_open_clip(config.model or "", config.pretrained).visual
    else:
        # the whole-model classes would build both towers; CoCa in open_clip is put together the same way
        architecture: Any = dict(config.vision_cfg)  # a mapping is taken too, whatever the signature says
        visual = _build_vision_tower(config.embed_dim, architecture, config.quick_gelu)
    expected = square(getattr(visual, "image_size", image_size))
    if expected != image_size:
        raise ConfigError(f"the open_clip image tower takes pictures of {expected} pixels, not {image_size}")
    return OpenClipImage(visual, config.embed_dim)


def build_open_clip_text(config: OpenClipTextConfig, tokenizer: Tokenizer) -> OpenClipText:
    """An open_clip text tower. Raises: ConfigError where the tokenizer does not fit it."""
    if config.pretrained:
        text = create_open_clip(config.model or "", config.pretrained).text
    else:
        text = _new_text(config)
    vocabulary, length = getattr(text, "vocab_size", 0), getattr(text, "context_length", 0)
    if vocabulary and tokenizer.vocab_size > vocabulary:
        raise ConfigError(
            f"the text tower knows {vocabulary} tokens, the tokenizer gives {tokenizer.vocab_size}"
        )
    if config.hf_config is None and tokenizer.context_length > length:
        raise ConfigError(
            f"the text tower takes {length} tokens, the tokenizer gives {tokenizer.context_length}"
        )
    return OpenClipText(text, config.embed_dim)


def _new_text(config: OpenClipTextConfig) -> nn.Module:
    from open_clip.model import _build_text_tower

    options: Any = dict(config.text_cfg)
    if config.hf_config is None:
        return _build_text_tower(config.embed_dim, options, config.quick_gelu)
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads the configuration from a name or a folder
        (Path(folder) / "config.json").write_text(json.dumps(config.hf_config))
        options |= {"hf_model_name": folder, "hf_model_pretrained": False}
        return _build_text_tower(config.embed_dim, options, config.quick_gelu)


def _with_architecture(data: Any, part: str) -> Any:
    """Options with open_clip's configuration of the named model filled in."""
    if not isinstance(data, dict) or data.get(part) is not None or not isinstance(data.get("model"), str):
        return data
    import open_clip

    found = open_clip.get_model_config(data["model"])
    if found is None:
        raise ValueError(f"open_clip has no model {data['model']!r}")
    quick_gelu = found.get("quick_gelu", False) or wants_quick_gelu(data["model"], data.get("pretrained"))
    found_here = {"embed_dim": found["embed_dim"], "quick_gelu": quick_gelu, part: found[part]}
    return {**found_here, **data, part: found[part]}


def square(size: int | tuple[int, ...] | list[int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"pictures that are not square ({size}) are not supported")
    return int(sides.pop())


def _first(output: Any) -> Tensor:
    """The pooled features: towers made for captioning also give their tokens."""
    return output[0] if isinstance(output, tuple) else output
