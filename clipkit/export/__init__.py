"""Backbones for others: an image tower as timm, torchvision and torchvision's detectors load it.

The export is a folder (weights, `config.json`, a card) or one safetensors file whose header says the same in
short. Either is there whole or not at all, and only after the target's own module gave the same features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors

from clipkit import __version__
from clipkit.errors import ArtifactError
from clipkit.export.backbone import (
    TARGETS,
    Backbone,
    Target,
    backbone_of,
    largest_difference,
    rebuild,
    timm_options,
)
from clipkit.export.card import card
from clipkit.files import atomic_folder, atomic_write, write_manifest
from clipkit.models import Encoder

__all__ = ["TARGETS", "Target", "export_backbone"]

KIND = "export"
WEIGHTS = "model.safetensors"


def export_backbone(
    encoder: Encoder, target: Target, out: Path | str, *, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write an encoder's tower for another library.

    Args:
        encoder: An image encoder whose tower is timm's.
        target: "timm", "torchvision" or "detection".
        out: A new folder, or a new file that ends in `.safetensors`.
        source: Where the encoder came from, JSON values by name, for the card and the header.

    Returns:
        `{"out", "to", "architecture", "features", "size", "small_stem", "fingerprint", "difference"}`: the
        last is the largest difference of a feature there from ours, as a share of the largest feature.

    Raises:
        InputError: A tower that the target has not.
        ArtifactError: `out` exists, or the target's module gives other features.
    """
    out = Path(out)
    backbone = backbone_of(encoder, target)
    state = backbone.state(target)
    difference = largest_difference(backbone, target, rebuild(backbone, target, state))
    look = encoder.preprocess.model_dump(mode="json")
    described = {
        "architecture": backbone.architecture,
        "features": backbone.tower.width,
        "size": encoder.preprocess.size,
        "small_stem": backbone.stem is not None,
        "fingerprint": encoder.fingerprint,
    }
    if out.suffix == ".safetensors":
        if out.exists():
            raise ArtifactError(f"{out} already exists", hint="choose another file or remove this one")
        header = {**described, "preprocess": look, "clipkit": __version__, "source": dict(source or {})}
        atomic_write(out, safetensors.save(state, {"clipkit": json.dumps({"to": target, **header})}))
    else:
        with atomic_folder(out) as folder:
            safetensors.save_file(state, folder / WEIGHTS)
            config = _timm_config(backbone) if target == "timm" else {**described, "preprocess": look}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            told = {"clipkit": __version__, "fingerprint": encoder.fingerprint, **(source or {})}
            (folder / "README.md").write_text(card(backbone, target, told), encoding="utf-8")
            write_manifest(folder, KIND, to=target, **described, preprocess=look, source=dict(source or {}))
    return {"out": str(out), "to": target, **described, "difference": difference}


def _timm_config(backbone: Backbone) -> dict[str, Any]:
    """What `timm.create_model("local-dir:…")` reads."""
    look = backbone.preprocess
    return {
        "architecture": backbone.architecture,
        "num_classes": 0,
        "num_features": backbone.tower.width,
        "model_args": {"num_classes": 0, **timm_options(backbone)},
        "small_stem": backbone.stem is not None,
        "pretrained_cfg": {
            "input_size": [3, look.size, look.size],
            "fixed_input_size": bool(timm_options(backbone)),
            "mean": list(look.mean),
            "std": list(look.std),
            "interpolation": look.interpolation,
            "crop_pct": look.size / (look.resize_size or look.size),
            "crop_mode": "squash" if look.resize == "squash" else "center",
            "num_classes": 0,
            "first_conv": None,
            "classifier": None,
        },
    }
