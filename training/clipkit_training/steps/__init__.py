"""Steps by name: what `step:` in a recipe may say. Each is a small file around the one contrastive core.

Builds: `build(model, config, setting)`, with an image-text model or an encoder, the options of the step, and
what it may need to know of the run.
"""

from typing import Any

from torch import nn

from clipkit.config import Config, validate
from clipkit.errors import ConfigError
from clipkit.registry import Registry, Spec
from clipkit_training.steps.base import Setting, Step
from clipkit_training.steps.byol import BYOLConfig, build_byol
from clipkit_training.steps.graphcl import GraphCLConfig, build_graphcl
from clipkit_training.steps.graphsage import GraphSAGEConfig, build_graphsage
from clipkit_training.steps.instdisc import InstDiscConfig, build_instdisc
from clipkit_training.steps.moco import MocoV1Config, MocoV2Config, build_moco_v1, build_moco_v2
from clipkit_training.steps.moco_v3 import MocoV3Config, build_moco_v3
from clipkit_training.steps.nce import NceConfig, build_nce
from clipkit_training.steps.pairs import build_clip, build_siglip
from clipkit_training.steps.simclr import SimCLRConfig, build_simclr
from clipkit_training.steps.simcse import SimCSEConfig, build_simcse
from clipkit_training.steps.simsiam import SimSiamConfig, build_simsiam
from clipkit_training.steps.supcon import SupConConfig, build_supcon

__all__ = ["STEPS", "Setting", "Step", "build_step", "step_name", "step_of"]

STEPS = Registry(
    "step",
    (
        Spec("clip", Config, build_clip),
        Spec("siglip", Config, build_siglip),
        Spec("simclr", SimCLRConfig, build_simclr),
        Spec("supcon", SupConConfig, build_supcon),
        Spec("moco_v1", MocoV1Config, build_moco_v1),
        Spec("moco_v2", MocoV2Config, build_moco_v2),
        Spec("moco_v3", MocoV3Config, build_moco_v3),
        Spec("byol", BYOLConfig, build_byol),
        Spec("simsiam", SimSiamConfig, build_simsiam),
        Spec("instdisc", InstDiscConfig, build_instdisc),
        Spec("nce", NceConfig, build_nce),
        Spec("simcse", SimCSEConfig, build_simcse),
        Spec("graphcl", GraphCLConfig, build_graphcl),
        Spec("graphsage", GraphSAGEConfig, build_graphsage),
    ),
    group="clipkit.steps",
)


def build_step(model: nn.Module, options: str | dict[str, Any], setting: Setting) -> Step:
    """The Step that a recipe names, around a model.

    Args:
        model: What is trained.
        options: A step's name, or `{"name": …, options…}`.
        setting: The run.

    Raises:
        NotFoundError: An unknown step.
        ConfigError: A wrong option, or a model that the step cannot train.
    """
    spec, config = step_of(options)
    return spec.build(model, config, setting)


def step_of(options: str | dict[str, Any]) -> tuple[Spec, Config]:
    """The kind of Step that a recipe names, and its options. Raises: NotFoundError, ConfigError."""
    name = step_name(options)
    spec = STEPS.get(name)
    rest = {} if isinstance(options, str) else {key: options[key] for key in options if key != "name"}
    return spec, validate(spec.config, rest, f"step {name!r}")


def step_name(options: str | dict[str, Any]) -> str:
    """The name in what a recipe says of its step. Raises: ConfigError where there is none."""
    name = options if isinstance(options, str) else options.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"step: name is missing; known: {', '.join(STEPS.names())}")
    return name
