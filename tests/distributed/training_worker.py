"""One rank of the training comparison: one batch of a recipe, its global loss and averaged gradients."""

import sys
from pathlib import Path

from safetensors.torch import save_file

from clipkit_training.loop import Trainer
from clipkit_training.recipe import load_recipe
from clipkit_training.world import world_from_environment


def main(recipe_path: str, out: str) -> None:
    recipe = load_recipe(recipe_path)
    with world_from_environment(recipe.device) as world:
        trainer = Trainer(recipe, Path(out).parent, world)
        batch = next(iter(trainer.data.batches(0)))
        loss, metrics = trainer.parallel(batch)
        loss.backward()
        if world.main:
            gradients = {}
            for name, parameter in trainer.model.named_parameters():
                assert parameter.grad is not None, name
                gradients[f"gradient.{name}"] = parameter.grad
            save_file({**gradients, "loss": metrics["loss"].detach()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
