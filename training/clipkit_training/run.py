"""A run: a recipe, its run folder, and the model folder that comes out of it.

The run folder holds the resolved recipe (`config.yaml`, which trains the same run again), checkpoints,
metrics and the result. A folder that already holds a run is only ever resumed, never overwritten.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from clipkit.config import dump_yaml, load_yaml, validate
from clipkit.errors import ArtifactError, ConfigError, NotFoundError
from clipkit.files import atomic_write, read_manifest
from clipkit.models import save_model
from clipkit_data.remote.retry import shown
from clipkit_training.evaluate import shard_digests
from clipkit_training.log import METRICS
from clipkit_training.loop import Trainer
from clipkit_training.recipe import Recipe
from clipkit_training.world import World

CONFIG = "config.yaml"
LOCK = ".lock"
MAY_CHANGE = {
    *("max_minutes", "max_steps", "max_epochs", "device", "evaluations", "checkpoints", "zero_shot_field"),
    *("data.train", "data.heldout", "data.workers", "data.cache", "data.max_bad"),
}
"""What a resumed run may have otherwise than before. Shards may have moved: their digests are compared."""


def train_recipe(
    recipe: Recipe, run: Path, world: World, *, resume: bool = False, model_folder: Path | None = None
) -> dict[str, Any]:
    """Train a recipe in a run folder and save the model.

    Args:
        recipe: What to train.
        run: The run folder, new unless `resume`.
        world: The processes that train together; every one calls this.
        resume: Continue from the newest whole checkpoint in `run`.
        model_folder: Where to put the model; `run/model` by default.

    Returns:
        Steps, seconds, pairs per second and so on; also written to `run/result.json`.

    Raises:
        ArtifactError: `run` already holds a run and `resume` is false, or a process is training in it.
        NotFoundError: There is no run in `run` to resume.
    """
    model_folder = model_folder or run / "model"
    world.barrier()
    if resume:
        _check_same_run(recipe, run)
    elif (run / CONFIG).exists() and _began(run):
        raise ArtifactError(f"{run} already holds a run", hint="add --resume, or choose another --run")
    _check_model_folder(model_folder, replace=resume)
    trainer = Trainer(recipe, run, world)
    with _alone(run) if world.main else nullcontext():
        if resume:
            trainer.resume()
        world.barrier()
        if world.main:
            atomic_write(run / CONFIG, dump_yaml(recipe))
        result = trainer.train()
        if world.main:
            save_model(
                trainer.model,
                model_folder,
                overwrite=resume,
                training={
                    "recipe": recipe.step,
                    "data": shown(recipe.data.train) or {shown(k): v for k, v in recipe.data.sources.items()},
                    "shards": [digest for data in trainer.data.datasets for digest in shard_digests(data)],
                    "seed": recipe.seed,
                    **{key: result[key] for key in ("steps", "pairs", "seconds")},
                },
            )
            result["model"] = str(model_folder)
            atomic_write(run / "result.json", json.dumps(result, indent=2) + "\n")
        world.barrier()
    return result


def _began(run: Path) -> bool:
    """Whether a run got as far as its first step."""
    metrics = run / METRICS
    return (run / "checkpoints").exists() or (metrics.is_file() and metrics.stat().st_size > 0)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Keep other trainers out of a run folder: ranks whose launcher was killed may still be at work.

    The lock is the process's, not the open file's: loader workers that outlive a killed rank do not hold it.

    Raises:
        ArtifactError: Another process has it.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ArtifactError(
                f"{run}: another process is training in it", hint="end it, or choose another --run"
            ) from None
        yield


def _check_same_run(recipe: Recipe, run: Path) -> None:
    """Refuse to resume a run with a recipe that would have made another one.

    Raises:
        NotFoundError: There is no run in `run`.
        ConfigError: Names the fields that differ and may not.
    """
    if not (run / CONFIG).is_file():
        raise NotFoundError(f"{run} holds no run to resume")
    saved = validate(Recipe, load_yaml(run / CONFIG), where=str(run / CONFIG))
    old, new = (dict(_flat(item.model_dump(mode="json"))) for item in (saved, recipe))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    refused = [name for name in changed if name not in MAY_CHANGE and not name.startswith("data.sources")]
    if refused:
        raise ConfigError(
            f"{run} was started with other values of {', '.join(refused)}",
            hint=f"resume with {run / CONFIG}, or start a new run",
        )


def _check_model_folder(folder: Path, *, replace: bool) -> None:
    """Refuse, before any training, a folder that the model may not go to. Raises: ArtifactError."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not replace:
        raise ArtifactError(f"{folder} already exists", hint="choose another --model, or remove it")
    read_manifest(folder, "model", verify=False)  # only a model is ever replaced by one


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, value
