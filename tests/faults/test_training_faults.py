"""Runs that are killed and resumed, on any number of ranks and workers, are the run that was never killed.

Everything here is real: `kill -9` of loader workers, of ranks, of torchrun, and of the process that is
writing a checkpoint, before each call that changes a file. What counts is the same at the end: the same
samples at each step and, for the same number of ranks, the same weights to the bit.
"""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from clipkit.errors import ArtifactError
from clipkit_training.checkpoint import COMMIT, newest_checkpoint
from clipkit_training.recipe import load_recipe
from clipkit_training.run import train_recipe
from clipkit_training.world import World
from tests.faults.training_runs import (
    Trainer,
    ended,
    records,
    same_run,
    samples,
    torchrun,
    wait_for_end,
    waiting,
    write_pairs,
)

WAIT_AT_5 = {"at": "step", "step": 5, "do": "wait", "rank": None}
SAVED = "checkpoints/step_{:08d}"


@pytest.fixture(scope="session")
def whole(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that was never killed, for some options and ranks: `whole("--data.lanes", "4", ranks=2)`."""
    runs: dict[tuple[object, ...], Path] = {}

    def run(*options: str, ranks: int = 1) -> Path:
        key = *options, ranks
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole") / "run"
            runs[key] = trainer.finish(folder, *options, ranks=ranks)
        return runs[key]

    return run


def test_a_killed_loader_worker_ends_the_run_in_one_line(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    running = trainer.start(tmp_path / "run", "--data.workers", "2", fault=WAIT_AT_5)
    workers = running.waiting()["workers"]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert running.codes() == [1]
    error = running.stderr()
    assert error.count("clipkit: error: a process that reads the data ended unexpectedly") == 1, error
    assert "Traceback" not in error
    trainer.finish(tmp_path / "run", "--data.workers", "2")
    same_run(tmp_path / "run", whole())
    wait_for_end(workers[1])


def test_loader_workers_end_when_their_rank_is_killed(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    running = trainer.start(tmp_path / "run", "--data.workers", "3", fault=WAIT_AT_5)
    found = running.waiting()
    assert len(found["workers"]) == 3
    os.kill(found["pid"], signal.SIGKILL)
    assert running.codes() == [-signal.SIGKILL]
    same_run(trainer.finish(tmp_path / "run"), whole())
    for pid in found["workers"]:
        wait_for_end(pid)


def test_a_killed_rank_ends_the_launcher_and_any_number_of_ranks_goes_on(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    job = trainer.job(tmp_path / "run", ranks=2, fault=WAIT_AT_5)
    launcher = torchrun(job)
    pids = [waiting(Path(job["out"]), rank)["pid"] for rank in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    assert launcher.wait(timeout=120) == 1
    assert f"exitcode  : -9 (pid: {pids[1]})" in (Path(job["out"]) / "stderr").read_text()
    wait_for_end(pids[0])
    for ranks in (2, 1, 3):
        run = tmp_path / f"on-{ranks}"
        shutil.copytree(tmp_path / "run", run)
        trainer.finish(run, ranks=ranks)
        assert samples(run) == samples(whole())
        losses, expected = ([row["loss"] for row in records(path)] for path in (run, whole()))
        assert losses == pytest.approx(expected, abs=2e-4)
    same_run(tmp_path / "on-2", whole(ranks=2))


def test_a_killed_launcher_leaves_a_run_that_goes_on(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    job = trainer.job(tmp_path / "run", ranks=2, fault=WAIT_AT_5)
    launcher = torchrun(job)
    pids = [waiting(Path(job["out"]), rank)["pid"] for rank in range(2)]
    launcher.kill()
    assert launcher.wait(timeout=60) == -signal.SIGKILL
    for pid in pids:
        if not ended(pid):  # nothing ends the ranks of a launcher that is gone
            os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
    same_run(trainer.finish(tmp_path / "run", ranks=2), whole(ranks=2))


def test_a_run_that_is_still_going_on_is_left_alone(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", World(0, 1, torch.device("cpu"), None)
    running = trainer.start(run, fault=WAIT_AT_5)
    running.waiting()
    with pytest.raises(ArtifactError, match="another process is training in it"):
        train_recipe(load_recipe(str(trainer.recipe)), run, alone, resume=True)
    running.release()
    assert running.codes() == [0], running.stderr()
    same_run(run, whole())


def interrupted(trainer: Trainer, run: Path, *, damaged: bool) -> Path:
    """A run whose next checkpoint is that of step 6; one that is damaged may be there already."""
    trainer.kill_at(7 if damaged else 5, run)
    if damaged:
        weights = run / SAVED.format(6) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    return run


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "over-a-damaged-one"])
def test_a_kill_at_any_call_of_a_checkpoint_leaves_a_whole_one(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path, damaged: bool
) -> None:
    start, new = interrupted(trainer, tmp_path / "start", damaged=damaged), Path(SAVED.format(6)).name
    shutil.copytree(start, tmp_path / "counted")
    watched = trainer.start(tmp_path / "counted", fault={"at": "save", "step": 6, "call": -1})
    assert watched.codes() == [0], watched.stderr()
    calls = watched.calls()
    committed, last = calls.index(f"replace {new}"), calls.index("end")
    assert calls[0] == "save_file model.safetensors"
    assert f"replace {COMMIT}" in calls[:committed]
    assert "rmdir" in " ".join(calls[committed:last]), "something old is dropped"
    for number in range(committed - 1 if damaged else 0, last + 1):  # before, both cases are the same
        run = tmp_path / f"killed-{number}"
        shutil.copytree(start, run)
        running = trainer.start(run, fault={"at": "save", "step": 6, "call": number})
        assert running.codes() == [-signal.SIGKILL], running.stderr()
        found = newest_checkpoint(run)
        assert found is not None
        assert found.name == (new if number > committed else "step_00000004"), calls[number]
        same_run(trainer.finish(run), whole())
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == [new, "step_00000008"], f"killed before {calls[number]}"


SPANNING = ("--data.batch-size", "8")  # of 20 samples: every fifth batch lies in two epochs
LANES = ("--data.lanes", "4", "--data.window", "5")


@pytest.mark.parametrize(
    ("options", "steps", "workers"),
    [
        ((), (2, 4, 6), (0, 0, 0, 0)),  # each time exactly at an epoch's end, where the checkpoint is too
        ((), (1, 3, 7), (1, 3, 0, 1)),  # first without a checkpoint
        (SPANNING, (3, 3, 5), (0, 1, 0, 0)),  # the third batch is of two epochs; again before any progress
        (LANES, (3, 5, 6), (3, 0, 1, 0)),
        ((*LANES, *SPANNING), (3, 4, 7), (0, 0, 0, 0)),
    ],
    ids=["epoch-ends", "workers", "spanning", "lanes", "lanes-spanning"],
)
def test_three_resumes_in_a_row_are_one_run(
    trainer: Trainer,
    whole: Callable[..., Path],
    tmp_path: Path,
    options: Sequence[str],
    steps: Sequence[int],
    workers: Sequence[int],
) -> None:
    run = tmp_path / "run"
    for step, number in zip(steps, workers, strict=False):
        trainer.kill_at(step, run, *options, "--data.workers", str(number))
    trainer.finish(run, *options, "--data.workers", str(workers[-1]))
    same_run(run, whole(*options))


def test_the_number_of_ranks_may_change_at_every_resume(
    trainer: Trainer, whole: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step, ranks in ((3, 1), (4, 3), (7, 2)):
        trainer.kill_at(step, run, *LANES, "--data.workers", "1" if ranks == 2 else "0", ranks=ranks)
    trainer.finish(run, *LANES)
    assert samples(run) == samples(whole(*LANES))
    losses, expected = ([row["loss"] for row in records(path)] for path in (run, whole(*LANES)))
    assert losses == pytest.approx(expected, abs=2e-4)


def test_two_weighted_sources_go_on_where_they_were(trainer: Trainer, pairs: Path, tmp_path: Path) -> None:
    other = write_pairs(tmp_path / "other", (5, 6))
    recipe = tmp_path / "two.yaml"
    text = trainer.recipe.read_text()
    two = f"sources: {{{pairs}: 0.7, {other}: 0.3}}"
    recipe.write_text(text.replace(f"train: {pairs}", two))
    run, uninterrupted = tmp_path / "run", trainer.finish(tmp_path / "whole", recipe=recipe)
    for step, ranks in ((3, 1), (5, 2), (7, 1)):
        trainer.kill_at(step, run, "--data.workers", str(ranks - 1), ranks=ranks, recipe=recipe)
    trainer.finish(run, recipe=recipe)
    assert samples(run) == samples(uninterrupted)
    alone = tmp_path / "alone"
    for step in (3, 5, 7):
        trainer.kill_at(step, alone, recipe=recipe)
    same_run(trainer.finish(alone, recipe=recipe), uninterrupted)
    recipe.write_text(recipe.read_text().replace("0.7", "0.6"))
    shutil.rmtree(alone / SAVED.format(8))
    words = trainer.refuse(alone, recipe=recipe)
    assert "share was 7/10, is 2/3" in words or "share was 3/10, is 1/3" in words
