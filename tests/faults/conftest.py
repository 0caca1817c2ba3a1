"""A server that starts and kills runs of the trainer, and what they train on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.training_runs import RECIPE, Trainer, serving, write_pairs


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 9, 4 and 7 samples."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards", (9, 4, 7))


@pytest.fixture(scope="session")
def trainer(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Starts runs of a tiny model on `pairs`: eight steps of ten samples, a checkpoint after every second."""
    folder = tmp_path_factory.mktemp("trainer")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.replace("TRAIN", str(pairs)))
    with serving(recipe, folder) as server:
        yield server
