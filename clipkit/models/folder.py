"""The model folder: `model.safetensors`, the tokenizer's files if it has any, and the manifest.

The manifest holds the whole configuration, so that a folder loads without a network and without a name of
the architecture it came from. The weights are safetensors: loading a model runs no code from it.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors

from clipkit.config import validate
from clipkit.errors import ArtifactError, ClipkitError
from clipkit.files import atomic_folder, read_manifest, write_manifest
from clipkit.models.build import build_model
from clipkit.models.dual_encoder import DualEncoder, ModelConfig
from clipkit.models.encoder import Encoder, EncoderConfig
from clipkit.text import TOKENIZER_FOLDER

KIND = "model"
WEIGHTS = "model.safetensors"


def save_model(
    model: DualEncoder | Encoder, folder: Path | str, *, overwrite: bool = False, **manifest_fields: Any
) -> None:
    """Write a model folder, whole or not at all.

    Args:
        model: What to save.
        folder: Where; it must not hold anything yet, unless `overwrite`.
        manifest_fields: Further JSON values for `clipkit.json`, for example where the model came from.

    Raises:
        ArtifactError: `folder` exists and `overwrite` is false.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        safetensors.save_model(model, str(temporary / WEIGHTS))
        if model.tokenizer is not None:
            model.tokenizer.save(temporary)
        what = {"scoring": model.scoring} if isinstance(model, DualEncoder) else {"modality": model.modality}
        write_manifest(
            temporary,
            KIND,
            config=model.config.model_dump(mode="json"),
            fingerprint=model.fingerprint,
            dim=model.dim,
            **what,
            **manifest_fields,
        )


def load_folder(folder: Path | str) -> DualEncoder | Encoder:
    """The model of a folder that `save_model` wrote, on the CPU and in eval mode.

    Raises:
        NotFoundError: No such folder.
        ArtifactError: No model folder, or files that are missing, changed or do not fit the configuration.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    if not isinstance(manifest.get("config"), dict) or not (folder / WEIGHTS).is_file():
        raise ArtifactError(f"{folder} is incomplete: it has no configuration or no {WEIGHTS}")
    kind = EncoderConfig if "tower" in manifest["config"] else ModelConfig
    config = validate(kind, manifest["config"], f"{folder}: config")
    try:
        # a seed keeps the global random state as it is; these weights are replaced at once
        files = folder if (folder / TOKENIZER_FOLDER).is_dir() else None
        model = build_model(config, seed=0, folder=files)
    except ClipkitError as error:
        error.message = f"{folder}: {error.message}"
        raise
    try:
        safetensors.load_model(model, str(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{folder}: the weights do not fit the configuration: {reason}", hint="save the model again"
        ) from error
    return model.eval()
