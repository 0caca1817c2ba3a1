"""Recipes: the typed description of a training run, from a YAML file and the command line.

A recipe names everything that decides a run: model, data, optimizer, budget, seed. Values come from the
defaults here, then the recipe, then the command line; the result is frozen, saved in the run folder as
`config.yaml`, and trains the same run again. Choices of kind (towers, step) are made in the recipe; the
command line overrides numbers and paths.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from clipkit.config import Config, load_yaml, validate
from clipkit.errors import NotFoundError
from clipkit.models import ModelConfig
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.pictures.crop import CropConfig

RECIPES = "clipkit_training.recipes"


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DataConfig(Config):
    """What to train and to evaluate on."""

    train: str = ""
    """Shards: a folder, a .tar, a brace pattern, a URL, sample:NAME, or stream:URL and pipe:COMMAND to read
    them as they come, without the promises of order and resuming."""
    sources: tyro.conf.SuppressFixed[tyro.conf.Fixed[dict[str, Weight]]] = Field({})
    """Several sources instead of `train`: shards, and how often they are read relative to the others."""
    heldout: str | None = None
    """Shards whose pairs are never trained on; recall is measured on them during training."""
    batch_size: Annotated[int, Field(ge=2)] = 256
    """Pairs per step, over all processes."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes per rank; 0 loads in the training process."""
    cache: bool = False
    """Keep decoded pictures in memory (small sets)."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """How many places of an epoch are read at once; it decides the order. None: 1 for up to a million
    samples, else 64. More lanes than processes let each process read few shards."""
    window: Annotated[int, Field(ge=1)] | None = None
    """Samples of a lane that are shuffled together. None: all for up to a million samples, else 8192."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Largest share of samples that cannot be used; beyond, training stops."""
    captions: tyro.conf.SuppressFixed[tyro.conf.Fixed[dict[str, float]]] = Field({"caption": 1.0})
    """Caption fields and how often each is drawn."""
    crop: tyro.conf.SuppressFixed[tyro.conf.Fixed[CropConfig]] | None = None
    """Random crops of the whole picture before it is resized; None resizes it as the model does."""
    augment: AugmentConfig = AugmentConfig()
    augment_on: Literal["workers", "device"] = "workers"
    """Where resized pictures are augmented: as they are loaded, or a batch at a time where the model is."""

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "DataConfig":
        if bool(self.train) == bool(self.sources):
            raise ValueError("give train, or sources with their weights: one of the two")
        return self


class OptimConfig(Config):
    """AdamW with linear warm-up and a cosine to zero over the budget."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to weights of two or more dimensions only."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; None for no clipping."""


class Recipe(Config):
    """One training run."""

    step: tyro.conf.SuppressFixed[tyro.conf.Fixed[str]] = "clip"
    """The method, by its name in the table of steps."""
    model: tyro.conf.SuppressFixed[tyro.conf.Fixed[ModelConfig]]
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock budget of the training loop; the learning rate reaches zero when it is spent."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the hardware multiplies in it, else fp16 on a GPU and fp32 on a CPU."""
    device: str = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    evaluations: Annotated[int, Field(ge=0)] = 10
    """How many times recall is measured over the run."""
    zero_shot_field: str | None = None
    """Metadata field whose values serve as zero-shot labels during evaluation."""
    checkpoints: Annotated[int, Field(ge=0)] = 4
    """How many checkpoints are written over the run, the last one at its end."""

    @model_validator(mode="after")
    def _budget(self) -> "Recipe":
        if self.max_minutes is None and self.max_steps is None and self.max_epochs is None:
            raise ValueError("give a budget: max_minutes, max_steps or max_epochs")
        return self


def recipe_names() -> list[str]:
    """The recipes that ship with clipkit."""
    return sorted(
        item.name.removesuffix(".yaml") for item in files(RECIPES).iterdir() if item.name.endswith(".yaml")
    )


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name or of a path. Raises: NotFoundError that lists the names."""
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return Path(str(files(RECIPES) / f"{name}.yaml"))
    raise NotFoundError(
        f"no recipe {name!r}", hint=f"give a YAML file or one of: {', '.join(recipe_names())}"
    )


def load_recipe(name: str, overrides: Sequence[str] = (), changes: dict[str, Any] | None = None) -> Recipe:
    """A recipe with the command line's overrides.

    Args:
        name: A shipped recipe's name or a YAML file.
        overrides: Command-line words such as `["--optim.lr", "3e-4"]`.
        changes: Top-level fields to set before the overrides, for example `{"seed": 1}`.

    Raises:
        NotFoundError: No such recipe.
        ConfigError: A key or value of the file is wrong. (A wrong override ends the program with usage.)
    """
    path = find_recipe(name)
    recipe = validate(Recipe, {**load_yaml(path), **(changes or {})}, where=str(path))
    if not overrides:
        return recipe
    return tyro.cli(Recipe, default=recipe, args=list(overrides), prog=f"clipkit train {name}")
