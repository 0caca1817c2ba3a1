"""A run: a recipe, its run folder, and the model folder that comes out of it.

The run folder holds the resolved recipe (`config.yaml`, which trains the same run again), checkpoints,
metrics and the result. A folder that already holds a run is only ever resumed, never overwritten.
"""

import json
from pathlib import Path
from typing import Any

from clipkit.config import dump_yaml
from clipkit.errors import ArtifactError, NotFoundError
from clipkit.files import atomic_write
from clipkit.models import save_model
from clipkit_training.evaluate import shard_digests
from clipkit_training.loop import Trainer
from clipkit_training.recipe import Recipe
from clipkit_training.world import World

CONFIG = "config.yaml"


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
        ArtifactError: `run` already holds a run and `resume` is false.
        NotFoundError: There is no run in `run` to resume.
    """
    model_folder = model_folder or run / "model"
    world.barrier()
    if resume and not (run / CONFIG).is_file():
        raise NotFoundError(f"{run} holds no run to resume")
    if not resume and (run / CONFIG).exists():
        raise ArtifactError(f"{run} already holds a run", hint="add --resume, or choose another --run")
    world.barrier()
    if world.main:
        run.mkdir(parents=True, exist_ok=True)
        atomic_write(run / CONFIG, dump_yaml(recipe))
    trainer = Trainer(recipe, run, world)
    if resume:
        trainer.resume()
    result = trainer.train()
    if world.main:
        save_model(
            trainer.model,
            model_folder,
            overwrite=resume,
            training={
                "recipe": recipe.step,
                "data": recipe.data.train,
                "shards": shard_digests(trainer.data),
                "seed": recipe.seed,
                **{key: result[key] for key in ("steps", "pairs", "seconds")},
            },
        )
        result["model"] = str(model_folder)
        atomic_write(run / "result.json", json.dumps(result, indent=2) + "\n")
    world.barrier()
    return result
