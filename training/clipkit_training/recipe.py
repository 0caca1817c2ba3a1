"""Recipes: the typed description of a training run, from a YAML file and the command line.

A recipe names everything that decides a run: model, data, optimizer, budget, seed. Values come from the
defaults here, then the recipe, then the command line; the result is frozen, saved in the run folder as
`config.yaml`, and trains the same run again. What is open to extension (`step`, `model`, `data.views`, …) is
validated by what it names, so its words on the command line are read as YAML: `--step.temperature 0.2`.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from clipkit.config import Config, load_yaml, validate
from clipkit.errors import ConfigError, NotFoundError
from clipkit.models import EncoderConfig, ModelConfig
from clipkit_data.pictures.augment import AugmentConfig
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import ViewsConfig, views_of

RECIPES = "clipkit_training.recipes"


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OPEN = (
    *("step", "model", "optim.milestones", "data.sources", "data.captions", "data.more_captions"),
    *("data.crop", "data.views"),
)
"""Parts of a recipe whose fields depend on what they name."""


def _kind_of_model(value: Any) -> str:
    fields = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    return "<encoder>" if "tower" in fields or "modality" in fields else "<pair>"


AnyModel = Annotated[
    Annotated[ModelConfig, Tag("<pair>")] | Annotated[EncoderConfig, Tag("<encoder>")],
    Discriminator(_kind_of_model),
]


_HIDDEN = (
    tyro.conf.Suppress,
    # read by `_set_open`: one word to tyro, whatever the type
    tyro.constructors.PrimitiveConstructorSpec(
        1, "YAML", lambda words: words[0], lambda value: True, lambda value: [str(value)]
    ),
)


class DataConfig(Config):
    """What to train and to evaluate on."""

    train: str = ""
    """Shards: a folder, a .tar, a brace pattern, a URL, sample:NAME, or stream:URL and pipe:COMMAND to read
    them as they come, without the promises of order and resuming."""
    sources: Annotated[dict[str, Weight], *_HIDDEN] = Field({})
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
    captions: Annotated[dict[str, float], *_HIDDEN] = Field({"caption": 1.0})
    """Caption fields and how often each is drawn."""
    crop: Annotated[CropConfig | None, *_HIDDEN] = None
    """Random crops of the whole picture before it is resized; None resizes it as the model does."""
    more_captions: Annotated[tuple[str, ...], *_HIDDEN] = ()
    """Further caption fields of each sample, for steps that want them: positives, hard negatives."""
    label: str | None = None
    """Metadata field that says of which class a sample is, for steps and judging that want labels."""
    load_size: Annotated[int, Field(ge=1)] | None = None
    """Side in pixels that whole pictures are squashed to, to cut views from; None cuts them from what the
    model sees."""
    views: Annotated[dict[str, Any] | None, *_HIDDEN] = None
    """Views of each picture, instead of `augment`: {family: NAME, size: S, …}, or {views: [...]}."""
    augment: AugmentConfig = AugmentConfig()
    augment_on: Literal["workers", "device"] = "workers"
    """Where resized pictures are augmented: as they are loaded, or a batch at a time where the model is."""

    def make_views(self, size: int) -> ViewsConfig | None:
        """The views, of `size` pixels a side where they do not say; None where there are none."""
        if self.views is None:
            return None
        return views_of({"size": size, **self.views} if "family" in self.views else self.views)

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> "DataConfig":
        if bool(self.train) == bool(self.sources):
            raise ValueError("give train, or sources with their weights: one of the two")
        return self


class OptimConfig(Config):
    """The optimizer, and how its learning rate goes over the budget after a linear warm-up."""

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to weights of two or more dimensions only."""
    decay_all: bool = False
    """Apply it to biases, norms and all else too, as plain SGD does in the codes of MoCo and SimSiam."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd and lars."""
    trust: Annotated[float, Field(gt=0)] = 0.001
    """Of lars: the trust coefficient."""
    trust_clip: bool = False
    """Of lars: let no weight move faster than by the learning rate itself, as solo-learn does."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """After the warm-up: a cosine to zero, a tenth at each milestone, or the same rate to the end."""
    milestones: Annotated[tuple[float, ...], *_HIDDEN] = (0.6, 0.8)
    """Of schedule: steps, in shares of the budget."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the whole gradient; None for no clipping."""


class Recipe(Config):
    """One training run."""

    step: Annotated[str | dict[str, Any], *_HIDDEN] = "clip"
    """The method: its name in the table of steps, or {name: NAME, …options}."""
    model: Annotated[AnyModel, *_HIDDEN]
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
    values = {**load_yaml(path), **(changes or {})}
    rest = _set_open(values, overrides)
    changed = " as changed by the command line" if len(rest) < len(overrides) else ""
    recipe = validate(Recipe, values, where=f"{path}{changed}")
    if not rest:
        return recipe
    return tyro.cli(Recipe, default=recipe, args=rest, prog=f"clipkit train {name}")


def _set_open(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set the overrides of open fields in a recipe's values. Returns the other overrides."""
    rest, words = list[str](), list(overrides)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--") or not any(name == part or name.startswith(f"{part}.") for part in OPEN):
            rest.append(word)
            continue
        if equals:
            value = word.partition("=")[2]
        elif words:
            value = words.pop(0)
        else:
            raise ConfigError(f"{word} has no value")
        *path, last = name.split(".")
        place = values
        for part in path:
            inner = place.get(part)
            if not isinstance(inner, str | dict | None):
                raise ConfigError(f"--{name}: {part} is {inner!r} and has no fields")
            # `step: simclr` is short for `step: {name: simclr}`
            place[part] = {"name": inner} if isinstance(inner, str) else dict(inner or {})
            place = place[part]
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name}: {value!r} is no YAML") from error
    return rest
