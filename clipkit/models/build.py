"""From a configuration to a model: `build_model` is the one place where names become modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from clipkit.errors import ConfigError
from clipkit.models.dual_encoder import DualEncoder, ModelConfig
from clipkit.models.towers import IMAGE_TOWERS, TEXT_TOWERS, build_tower
from clipkit.text import build_tokenizer


def build_model(config: ModelConfig, seed: int | None = None, folder: Path | None = None) -> DualEncoder:
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
    tokenizer = build_tokenizer(config.tokenizer, folder)
    with _seeded(seed):
        image, image_options = build_tower(IMAGE_TOWERS, config.image, config.preprocess.size)
        text, text_options = build_tower(TEXT_TOWERS, config.text, tokenizer)
        complete = config.model_copy(
            update={"image": image_options, "text": text_options, "tokenizer": tokenizer.config()}
        )
        try:
            return DualEncoder(image, text, complete, tokenizer)
        except ValueError as error:
            raise ConfigError(f"model.{error}") from error


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from a seed of one's own; new weights are drawn on the CPU, so other devices are left alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
