"""Checkpoints that count only when they are whole: a folder per step, with `COMMIT` written last.

`run/checkpoints/step_00000120/` holds model and optimizer tensors as safetensors (no pickle), the loop's
numbers as JSON, the bad samples found so far, and a `COMMIT` with the SHA-256 of each file. A folder without
a `COMMIT` that verifies is a crash's remains and is passed over when resuming. Nothing is ever overwritten
in place.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clipkit.errors import ArtifactError
from clipkit.files import atomic_folder, atomic_write, sha256_file
from clipkit_data.batches.quarantine import FILE as QUARANTINE
from clipkit_data.batches.quarantine import BadSample, write_quarantine

COMMIT = "COMMIT"
KEEP = 2


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    bad: Sequence[BadSample] = (),
) -> Path:
    """Write the checkpoint of a step; drop all but the newest `KEEP`, and what a killed process left.

    Args:
        run: The run folder.
        step: Optimizer steps taken so far; names the folder.
        model: The Step; its state dict is saved.
        optimizer: Its per-parameter state must be tensors.
        state: JSON-able numbers of the loop.
        bad: The samples that could not be used so far.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    for remains in folder.parent.glob(".step_*"):  # of a process that was killed here
        shutil.rmtree(remains)
    with atomic_folder(folder, overwrite=True) as temporary:
        save_file(_contiguous(model.state_dict()), temporary / "model.safetensors")
        save_file(_contiguous(_optimizer_tensors(optimizer)), temporary / "optimizer.safetensors")
        atomic_write(temporary / "state.json", json.dumps(state, indent=2))
        write_quarantine(temporary / QUARANTINE, bad)
        digests = {item.name: sha256_file(item) for item in sorted(temporary.iterdir())}
        atomic_write(temporary / COMMIT, json.dumps({"step": step, "files": digests}, indent=2))
    earlier = [other for other in sorted((run / "checkpoints").glob("step_*")) if other.name <= folder.name]
    for old in earlier[:-KEEP]:
        shutil.rmtree(old)
    return folder


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint whose `COMMIT` is there and verifies; None when there is none."""
    for folder in sorted((run / "checkpoints").glob("step_*"), reverse=True):
        if _whole(folder):
            return folder
    return None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore model and optimizer; returns the loop's numbers.

    Raises:
        ArtifactError: The checkpoint's tensors do not fit this model or optimizer.
    """
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        _restore_optimizer(optimizer, load_file(folder / "optimizer.safetensors"))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not on this machine", hint="all processes need one run folder"
        ) from error
    except (RuntimeError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"{folder}: does not fit the recipe's model: {str(error).splitlines()[0]}",
            hint="resume with the run's own config.yaml",
        ) from error
    return json.loads((folder / "state.json").read_text())


def _whole(folder: Path) -> bool:
    try:
        commit = json.loads((folder / COMMIT).read_text())
        return all(sha256_file(folder / name) == digest for name, digest in commit["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": torch.as_tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = _parameters(optimizer)
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.ndim and tensor.shape != parameter.shape:
            raise ValueError(f"optimizer state {name} has shape {tuple(tensor.shape)}")
        optimizer.state[parameter][key] = tensor.to(parameter.device)
