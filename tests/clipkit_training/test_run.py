"""Real runs of a tiny model on real shards: learning, logs, resuming, refusing, damage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit.errors import ArtifactError, ClipkitError, ConfigError, NotFoundError
from clipkit.models import load_model
from clipkit_training.checkpoint import COMMIT, newest_checkpoint
from clipkit_training.evaluate import evaluate_model
from clipkit_training.loop import Budget
from clipkit_training.recipe import Recipe, load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.world import World

ALONE = World(0, 1, torch.device("cpu"), None)


def rows(run: Path, kind: str) -> list[dict]:
    """The records of one kind in a run's metrics."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def recipe_of(path: Path, *overrides: str) -> Recipe:
    return load_recipe(str(path), overrides)


def test_it_learns_and_says_so(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train_recipe(recipe_of(tiny_recipe, "--max-steps", "60"), run, ALONE)
    assert result["steps"] == 60
    assert result["pairs"] == 60 * 24
    assert result["faults"] == {}
    train, heldout = rows(run, "train"), rows(run, "heldout")
    assert [row["step"] for row in train] == list(range(1, 61))
    assert train[-1]["loss"] < 0.6 * train[0]["loss"]
    assert train[-1]["accuracy"] > train[0]["accuracy"]
    assert len(heldout) == 2
    assert heldout[-1]["text_to_image"]["recall@1"] > 0.25, "chance is 0.04"
    assert heldout[-1]["zero_shot"] > 0.3, "chance is 0.17"
    assert list((run / "tensorboard").iterdir())
    figures = evaluate_model(str(run / "model"), [recipe_of(tiny_recipe).data.heldout or ""])
    assert figures["heldout"]["queries"] == figures["heldout"]["gallery"] == 24
    assert figures["heldout"]["text_to_image"] == heldout[-1]["text_to_image"], "saved and loaded"
    trained, untrained = figures["heldout"], figures["untrained"]["heldout"]
    assert trained["text_to_image"]["recall@1"] > untrained["text_to_image"]["recall@1"]


def test_seen_and_heldout_are_told_apart(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe)
    train_recipe(recipe, tmp_path / "run", ALONE)
    figures = evaluate_model(str(tmp_path / "run/model"), [recipe.data.train, recipe.data.heldout or ""])
    assert figures["seen"]["queries"] == 72
    assert figures["heldout"]["queries"] == 24
    assert figures["seen"]["gallery"] == figures["heldout"]["gallery"] == 96
    assert set(figures["untrained"]) == {"seen", "heldout"}


def test_one_folder_of_both_kinds_is_told_apart(
    tiny_recipe: Path, shape_shards: Path, tmp_path: Path
) -> None:
    train_recipe(recipe_of(tiny_recipe), tmp_path / "run", ALONE)
    mixed = tmp_path / "mixed"
    for split in ("train", "heldout"):
        shutil.copytree(shape_shards / split, mixed / split)
    sources = [str(path) for path in sorted(mixed.rglob("*.tar"))]
    figures = evaluate_model(
        str(tmp_path / "run/model"), sources, gallery=[str(mixed / "train")], untrained=False
    )
    assert (figures["seen"]["queries"], figures["heldout"]["queries"]) == (72, 24)
    assert figures["seen"]["gallery"] == 96, "no picture twice"


def test_damaged_evaluation_samples_are_counted(
    tiny_recipe: Path, shape_shards: Path, tmp_path: Path
) -> None:
    train_recipe(recipe_of(tiny_recipe), tmp_path / "run", ALONE)
    shards = tmp_path / "damaged"
    shutil.copytree(shape_shards / "heldout", shards)
    data = bytearray((shards / "00000.tar").read_bytes())
    start = data.index(b"IDAT") + 8
    data[start : start + 8] = bytes(8)
    (shards / "00000.tar").write_bytes(data)
    figures = evaluate_model(str(tmp_path / "run/model"), [str(shards)], untrained=False)["heldout"]
    assert figures["queries"] == 23
    assert sum(figures["faults"].values()) == 1


def test_resuming_is_bit_equal(tiny_recipe: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_recipe(recipe_of(tiny_recipe), whole, ALONE)
    train_recipe(recipe_of(tiny_recipe), parts, ALONE)
    shutil.rmtree(parts / "checkpoints/step_00000006")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 9')  # a line cut off by the crash
    result = train_recipe(recipe_of(tiny_recipe), parts, ALONE, resume=True)
    assert result["steps"] == 6
    first, second = (load_file(run / "model/model.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for kind in ("train", "heldout"):
        assert [row["step"] for row in rows(whole, kind)] == [row["step"] for row in rows(parts, kind)]
    assert [row["loss"] for row in rows(whole, "train")] == [row["loss"] for row in rows(parts, "train")]


def test_a_checkpoint_counts_only_when_whole(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_recipe(recipe_of(tiny_recipe), run, ALONE)
    newest, older = run / "checkpoints/step_00000006", run / "checkpoints/step_00000003"
    assert newest_checkpoint(run) == newest
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert newest_checkpoint(run) == older, "a flipped bit"
    (older / COMMIT).unlink()
    assert newest_checkpoint(run) is None, "no COMMIT"


def test_a_run_is_never_overwritten(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(NotFoundError, match="no run to resume"):
        train_recipe(recipe_of(tiny_recipe), run, ALONE, resume=True)
    train_recipe(recipe_of(tiny_recipe), run, ALONE)
    with pytest.raises(ArtifactError, match="already holds a run"):
        train_recipe(recipe_of(tiny_recipe), run, ALONE)


def test_only_a_model_is_replaced_by_a_model(tiny_recipe: Path, tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    train_recipe(recipe_of(tiny_recipe), run, ALONE)
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="already exists"):
        train_recipe(recipe_of(tiny_recipe), tmp_path / "other", ALONE, model_folder=precious)
    with pytest.raises(ArtifactError, match="no model folder"):
        train_recipe(recipe_of(tiny_recipe), run, ALONE, resume=True, model_folder=precious)
    assert (precious / "letter.txt").read_text() == "dear"
    assert not (tmp_path / "other").exists(), "refused before training"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        (("--optim.lr", "0.1"), "optim.lr"),
        (("--data.batch-size", "12"), "data.batch_size"),
        (("--seed", "9"), "seed"),
    ],
)
def test_resuming_refuses_another_recipe(
    tiny_recipe: Path, tmp_path: Path, override: tuple[str, ...], field: str
) -> None:
    run = tmp_path / "run"
    train_recipe(recipe_of(tiny_recipe), run, ALONE)
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=f"other values of {field}"):
        train_recipe(recipe_of(tiny_recipe, *override), run, ALONE, resume=True)
    assert (run / "config.yaml").read_text() == before
    more = train_recipe(recipe_of(tiny_recipe, "--max-steps", "8"), run, ALONE, resume=True)
    assert more["steps"] == 8, "a larger budget is welcome"


def test_a_failed_start_leaves_no_run(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipkitError):
        train_recipe(recipe_of(tiny_recipe, "--data.train", "nowhere"), tmp_path / "run", ALONE)
    assert not (tmp_path / "run").exists()


def test_resuming_refuses_other_shards(tiny_recipe: Path, shape_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_recipe(recipe_of(tiny_recipe), run, ALONE)
    other = recipe_of(tiny_recipe, "--data.train", str(shape_shards / "heldout"))
    with pytest.raises(
        ArtifactError,
        match=r"not what the run started with: .*00001\.tar is gone; .*00000\.tar: 36 samples then, 24 now",
    ):
        train_recipe(other, run, ALONE, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_recipe: Path, tmp_path: Path) -> None:
    wild = recipe_of(
        tiny_recipe, "--optim.lr", "1e30", "--optim.clip-norm", "None", "--optim.warmup-steps", "0"
    )
    with pytest.raises(ClipkitError, match=r"the loss is .* at step \d"):
        train_recipe(wild, tmp_path / "run", ALONE)
    assert not (tmp_path / "run/model").exists()


def test_a_time_budget_ends_the_run(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe, "--max-minutes", "0.02", "--max-steps", "100000")
    result = train_recipe(recipe, tmp_path / "run", ALONE)
    assert 0 < result["steps"] < 100000


def test_progress_is_that_of_the_nearest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("clipkit_training.loop.time.monotonic", lambda: now)
    budget = Budget(max_steps=100, max_seconds=60, spent_before=10, started=now)
    assert budget.progress(0) == pytest.approx(10 / 60)
    assert budget.progress(50) == 0.5
    now += 35
    assert budget.seconds() == 45
    assert budget.progress(50) == 0.75
    budget.reserve = 15
    assert budget.progress(50) == 1, "the next step may not fit"
    assert Budget(None, 60, 0, now).progress(10**9) == 0


def test_damaged_samples_are_replaced_and_reported(
    tiny_recipe: Path, shape_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "damaged"
    shutil.copytree(shape_shards / "train", shards)
    shard = shards / "00000.tar"
    data = bytearray(shard.read_bytes())
    start = data.index(b"IDAT") + 8
    data[start : start + 8] = bytes(8)
    shard.write_bytes(data)
    run = tmp_path / "run"
    result = train_recipe(recipe_of(tiny_recipe, "--data.train", str(shards)), run, ALONE)
    assert sum(result["faults"].values()) == 1
    bad = json.loads((run / "quarantine.jsonl").read_text())
    assert (bad["shard"], bad["index"], bad["key"]) == ("00000.tar", 0, "000000000")
    last = max((run / "checkpoints").iterdir())
    assert (last / "quarantine.jsonl").read_text() == (run / "quarantine.jsonl").read_text()
    assert load_model(str(run / "model")).dim == 32
