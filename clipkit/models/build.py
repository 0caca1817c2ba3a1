"""From a configuration to a model: `build_model` is the one place where names become modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch

from clipkit.errors import ConfigError
from clipkit.models.dual_encoder import DualEncoder, ModelConfig
from clipkit.models.encoder import Encoder, EncoderConfig
from clipkit.models.towers import GRAPH_TOWERS, IMAGE_TOWERS, TEXT_TOWERS, build_tower
from clipkit.text import Tokenizer, build_tokenizer


@overload
def build_model(config: ModelConfig, seed: int | None = None, folder: Path | None = None) -> DualEncoder: ...
@overload
def build_model(config: EncoderConfig, seed: int | None = None, folder: Path | None = None) -> Encoder: ...
def build_model(
    config: ModelConfig | EncoderConfig, seed: int | None = None, folder: Path | None = None
) -> DualEncoder | Encoder:
    """A model with new weights, on the CPU and in training mode.

    Args:
        config: What to build.
        seed: Seed of the weights; the global random state is left as it was. None draws from it.
        folder: The model folder the configuration was read from, for the tokenizer's files.

    Returns:
        The model; its `config` is `config` with every default filled in.

    Raises:
        ConfigError: A wrong option, or towers that do not fit the rest.
        NotFoundError: An unknown tower, architecture or tokenizer.
        DependencyError: Files that are neither here nor can be downloaded.
    """
    if isinstance(config, EncoderConfig):
        return _build_encoder(config, seed, folder)
    tokenizer = build_tokenizer(config.tokenizer, folder)
    with seeded(seed):
        image, image_options = build_tower(IMAGE_TOWERS, config.image, config.preprocess.size)
        text, text_options = build_tower(TEXT_TOWERS, config.text, tokenizer)
        complete = config.model_copy(
            update={"image": image_options, "text": text_options, "tokenizer": tokenizer.config()}
        )
        try:
            return DualEncoder(image, text, complete, tokenizer)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error


def _build_encoder(config: EncoderConfig, seed: int | None, folder: Path | None) -> Encoder:
    tokenizer = build_tokenizer(config.tokenizer, folder) if config.modality == "text" else None
    return new_encoder(config, seed, tokenizer)


def new_encoder(config: EncoderConfig, seed: int | None, tokenizer: Tokenizer | None) -> Encoder:
    """An encoder with new weights around a tokenizer that is there; see `build_model`."""
    table = {"image": IMAGE_TOWERS, "text": TEXT_TOWERS, "graph": GRAPH_TOWERS}[config.modality]
    argument = {"image": config.preprocess.size, "text": tokenizer, "graph": None}[config.modality]
    with seeded(seed):
        tower, options = build_tower(table, config.tower, argument)
    complete = config.model_copy(
        update={"tower": options, "tokenizer": tokenizer.config() if tokenizer else config.tokenizer}
    )
    return Encoder(tower, complete, tokenizer)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed of one's own; new weights are drawn on the CPU, so other devices are left alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
