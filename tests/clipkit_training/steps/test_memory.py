"""Steps with a queue or a bank on two ranks, and stopped in the middle of a real run: the same numbers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save

from clipkit_training.loop import Trainer
from clipkit_training.recipe import load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.steps.base import Setting
from clipkit_training.steps.instdisc import BankStep
from clipkit_training.world import World
from tests.clipkit_training.steps import memory_worker as worker
from tests.clipkit_training.steps.memory_worker import INSTDISC, MOCO, NCE, batches, tiny
from tests.clipkit_training.steps.support import assert_near, train
from tests.distributed.support import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks of a real gloo group found."""
    return run(worker, tmp_path_factory.mktemp("gloo"), 2)


@pytest.mark.parametrize("case", worker.CASES)
def test_two_ranks_train_as_one_process_does(ranks: list[dict[str, Any]], case: str) -> None:
    alone = worker.trained(case, None, None)
    share = (
        2e-2 if worker.CASES[case][0] == "batch_norm" else 1e-4
    )  # a ReLU near 0 may open in one of the two alone
    for found in (rank[case] for rank in ranks):
        for name, values in alone["figures"].items():
            torch.testing.assert_close(found["figures"][name], values, rtol=1e-4, atol=1e-5, msg=name)
        assert_near(found["gradients"], alone["gradients"], share)
        assert_near(found["state"], alone["state"], share / 50)
        assert all(torch.equal(found["places"][name], value) for name, value in alone["places"].items())
    for part in ("state", "places"):
        first, second = (rank[case][part] for rank in ranks)
        assert all(torch.equal(value, second[name]) for name, value in first.items()), "the ranks differ"


@pytest.mark.parametrize(
    "options",
    [
        MOCO,  # 8 keys a step in a queue of 20: it is stopped in the middle of its second round
        MOCO | {"queue": 64, "symmetric": True},
        INSTDISC | {"draws": 9},
        *(NCE | {"z": z} for z in ("learnable", "moving", "fixed")),
    ],
)
def test_faults_4_14_15_resuming_from_a_state_dict_is_bit_equal(options: dict[str, Any]) -> None:
    views = 2 if options["name"] == "moco_v2" else 0
    whole, stopped, resumed = (tiny(options, samples=worker.SAMPLES) for _ in range(3))
    expected = train(whole, batches(6, views=views))
    found = train(stopped, batches(3, views=views))
    resumed.load_state_dict(load(save(stopped.state_dict())))
    found += train(resumed, batches(3, first=3, views=views))
    assert found == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


RECIPE = """
step: STEP
max_steps: 6
precision: fp32
device: cpu
evaluations: 0
checkpoints: 2
model:
  tower: {name: timm, model: test_resnet, small_stem: true}
  preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], resize: squash}
optim: {name: sgd, lr: 0.05, warmup_steps: 2}
data:
  train: TRAIN
  batch_size: 16
  views: {family: simclr, size: 16}
"""


def test_a_step_is_told_the_seed_of_the_recipe(shape_shards: Path, tmp_path: Path) -> None:
    path, world = tmp_path / "recipe.yaml", World(0, 1, torch.device("cpu"), None)
    text = RECIPE.replace("STEP", "{name: nce, draws: 20}").replace("TRAIN", str(shape_shards / "train"))
    path.write_text(text + "seed: 7\n")
    method = Trainer(load_recipe(str(path)), tmp_path / "run", world).method
    assert isinstance(method, BankStep)
    assert method.generator(3).initial_seed() == Setting(seed=7).generator(3).initial_seed()


@pytest.mark.parametrize(
    ("step", "views"),
    [
        ("{name: moco_v2, queue: 40, dim: 8, symmetric: true}", "{family: simclr, size: 16}"),
        ("{name: instdisc, dim: 8}", "{family: none}"),
        ("{name: nce, dim: 8, draws: 20}", "null"),
    ],
)
def test_a_run_that_was_stopped_resumes_bit_for_bit(
    shape_shards: Path, tmp_path: Path, step: str, views: str
) -> None:
    path, world = tmp_path / "recipe.yaml", World(0, 1, torch.device("cpu"), None)
    text = RECIPE.replace("STEP", step).replace("TRAIN", str(shape_shards / "train"))
    path.write_text(text.replace("{family: simclr, size: 16}", views))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_recipe(load_recipe(str(path)), whole, world)["steps"] == 6
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/step_00000006")
    assert train_recipe(load_recipe(str(path)), parts, world, resume=True)["steps"] == 6
    for file in ("model/model.safetensors", "checkpoints/step_00000006/model.safetensors"):
        first, second = (load_file(folder / file) for folder in (whole, parts))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
