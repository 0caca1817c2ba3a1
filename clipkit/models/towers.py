"""The towers by name: one table for pictures, one for texts, one for graphs.

An image tower maps normalised pixels (N, 3, S, S) to (N, width); a text tower maps token ids (N, L) to
(N, width) and says with `trimmable` whether trailing padding may be cut off without changing anything. A
tower whose last layer already is a linear projection into a shared space says so with `projects`. Built-in
towers come from `clipkit.models.builtin`, the others from timm, open_clip and transformers. A tower's
options are complete once validated, so that a saved model is built again without a network.

Builds: image towers `build(config, image_size)`; text towers `build(config, tokenizer)`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from clipkit.config import Config, validate
from clipkit.errors import ConfigError, DependencyError, NotFoundError
from clipkit.models.builtin import CNNConfig, TextTransformerConfig, build_cnn, build_transformer
from clipkit.models.towers_graph import GINConfig, build_gin
from clipkit.models.towers_hf import HFImageConfig, HFTextConfig, build_hf_image, build_hf_text
from clipkit.models.towers_open_clip import (
    OpenClipImageConfig,
    OpenClipTextConfig,
    build_open_clip_image,
    build_open_clip_text,
)
from clipkit.models.towers_video import FramesConfig, build_frames
from clipkit.registry import Registry, Spec
from clipkit.text import Tokenizer


class TimmConfig(Config):
    """Any image model of timm, without its classifier.

    Args:
        model: timm's name, for example "vit_small_patch16_224".
        pretrained: Start from timm's weights (downloaded); a saved model has its own.
        drop_path: Stochastic depth rate.
        small_stem: For pictures of up to 64 pixels, of a ResNet: begin with a 3×3 convolution of stride 1 and
            without max-pooling (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
            Representations", appendix B.9). The convolution of a 7×7 stem is replaced by a new one.
    """

    model: str
    pretrained: bool = False
    drop_path: float = 0.0
    small_stem: bool = False


class TimmImage(nn.Module):
    """A timm model whose pooled features are the embedding."""

    projects = False

    def __init__(self, trunk: nn.Module, image_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = _measured_width(trunk, image_size)

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        return self.trunk(pixels_N3SS)


def build_timm(config: TimmConfig, image_size: int) -> TimmImage:
    """A timm tower for pictures of `image_size` pixels.

    Raises:
        NotFoundError: timm has no such model.
        DependencyError: Its weights cannot be downloaded.
        ConfigError: It takes no pictures of that size, has no pooled features, or is no ResNet and so has no
            small stem.
    """
    import timm

    name = config.model.split(".")[0]
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise NotFoundError(f"timm has no model {config.model!r}", hint=f"near: {', '.join(near) or 'none'}")
    options: dict[str, Any] = {"num_classes": 0}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    default = timm.get_pretrained_cfg(config.model)
    if default is not None and default.fixed_input_size:
        options["img_size"] = image_size
    try:
        trunk = timm.create_model(config.model, pretrained=config.pretrained, **options)
        if config.small_stem:
            _make_stem_small(trunk, config.model)
        return TimmImage(trunk, image_size)
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise ConfigError(
                f"timm's {config.model!r} cannot be built for pictures of {image_size} pixels: {error}"
            ) from error
        raise DependencyError(
            f"cannot load timm's weights of {config.model!r}: {error}",
            hint="needs a network once; or pretrained: false",
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"timm's {config.model!r} cannot be built for pictures of {image_size} pixels: {error}"
        ) from error


def _make_stem_small(trunk: nn.Module, name: str) -> None:
    """Keep the size of the picture in the stem of a ResNet; most of its variants in timm are one class."""
    from timm.models.resnet import ResNet

    if not isinstance(trunk, ResNet):
        raise ConfigError(
            f"small_stem: timm's {name!r} is no ResNet, its stem cannot be changed",
            hint="leave small_stem out",
        )
    if isinstance(trunk.conv1, nn.Conv2d):
        trunk.conv1 = nn.Conv2d(trunk.conv1.in_channels, trunk.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's own
    else:  # a deep stem is 3×3 convolutions already, the first one with stride 2
        first = trunk.conv1[0]
        assert isinstance(first, nn.Conv2d)
        first.stride = (1, 1)
    trunk.maxpool = nn.Identity()


@torch.no_grad()
def _measured_width(trunk: nn.Module, image_size: int) -> int:
    """The width of the features, from a dry run: timm's `num_features` is not it for some models."""
    was_training = trunk.training
    features = trunk.eval()(torch.zeros(1, 3, image_size, image_size))
    trunk.train(was_training)
    if features.ndim != 2:
        raise ConfigError(f"the image model gives features of shape {tuple(features.shape)}, not pooled ones")
    return features.shape[1]


def _build_transformer(config: TextTransformerConfig, tokenizer: Tokenizer) -> nn.Module:
    return build_transformer(config, tokenizer.vocab_size, tokenizer.context_length, tokenizer.eos_id)


IMAGE_TOWERS = Registry(
    "image tower",
    (
        Spec("cnn", CNNConfig, build_cnn),
        Spec("timm", TimmConfig, build_timm),
        Spec("open_clip", OpenClipImageConfig, build_open_clip_image),
        Spec("hf", HFImageConfig, build_hf_image),
        Spec("frames", FramesConfig, build_frames),
    ),
    group="clipkit.image_towers",
)

GRAPH_TOWERS = Registry("graph tower", (Spec("gin", GINConfig, build_gin),), group="clipkit.graph_towers")

TEXT_TOWERS = Registry(
    "text tower",
    (
        Spec("transformer", TextTransformerConfig, _build_transformer),
        Spec("open_clip", OpenClipTextConfig, build_open_clip_text),
        Spec("hf", HFTextConfig, build_hf_text),
    ),
    group="clipkit.text_towers",
)


def build_tower(
    table: Registry, options: dict[str, Any], argument: int | Tokenizer | None
) -> tuple[nn.Module, dict[str, Any]]:
    """One tower and its complete options.

    Args:
        table: `IMAGE_TOWERS`, `TEXT_TOWERS` or `GRAPH_TOWERS`.
        options: `{"name": …, options…}`.
        argument: The picture size for image towers, the tokenizer for text towers, None for graph towers.

    Returns:
        The tower, and `options` with every default filled in and nothing left that needs a network.

    Raises:
        ConfigError: No name, or a wrong option.
        NotFoundError: An unknown tower or architecture.
    """
    rest = dict(options)
    name = rest.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{table.family}: name is missing; known: {', '.join(table.names())}")
    spec = table.get(name)
    config = validate(spec.config, rest, f"{table.family} {name!r}")
    try:
        tower = spec.build(config, argument)
    except ValueError as error:
        raise ConfigError(f"{table.family} {name!r}: {error}") from error
    complete = config.model_dump(mode="json")
    if "pretrained" in complete:  # the saved model has weights of its own
        complete["pretrained"] = type(config).model_fields["pretrained"].default
    return tower, {"name": name, **complete, **getattr(tower, "completed", {})}
