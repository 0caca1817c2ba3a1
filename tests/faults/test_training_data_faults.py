"""Resuming with shards that changed, moved, broke or went away: the same samples, or an error that says why.

A run is resumed from its checkpoint only when each step would read what it would have read. Bad samples are
listed once, whoever met them first. A shard that is away for a while stops the run and changes nothing else.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipkit_data.shards.scan import scan_shard
from clipkit_data.tools.indexing import index_shards
from tests.faults.training_runs import Trainer, records, same_run, samples, write_pairs


@pytest.fixture(scope="module")
def whole(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    return trainer.finish(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its second checkpoint."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    trainer.kill_at(5, run)
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return shutil.copytree(stopped, tmp_path / "run")


def without_its_last_sample(shards: Path) -> None:
    shard = shards / "00001.tar"
    last = scan_shard(shard).samples[-1]
    shard.write_bytes(shard.read_bytes()[: last.header] + bytes(1024))


def with_another_sample(shards: Path) -> None:
    other = write_pairs(shards / "other", (8, 4)) / "00001.tar"  # each is the one before
    shutil.copy(other, shards / "00001.tar")
    shutil.rmtree(other.parent)


def without_a_shard(shards: Path) -> None:
    (shards / "00002.tar").unlink()


def with_one_more(shards: Path) -> None:
    shutil.copy(shards / "00000.tar", shards / "00003.tar")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_its_last_sample, "00001.tar: 4 samples then, 3 now"),
        (with_another_sample, "00001.tar holds other samples"),
        (without_a_shard, "00002.tar is gone"),
        (with_one_more, "00003.tar is new"),
    ],
)
def test_changed_shards_are_refused_by_name(
    trainer: Trainer, pairs: Path, run: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    shards = shutil.copytree(pairs, tmp_path / "shards")
    change(shards)
    before = (run / "metrics.jsonl").read_text()
    error = trainer.refuse(run, "--data.train", str(shards))
    assert "the data is not what the run started with" in error
    assert f"{shards}: {words}" in error
    assert (run / "metrics.jsonl").read_text() == before


def test_another_order_of_the_shards_is_refused(trainer: Trainer, pairs: Path, run: Path) -> None:
    error = trainer.refuse(run, "--data.train", str(pairs / "{00001,00000,00002}.tar"))
    assert "the shards are in another order" in error


@pytest.mark.parametrize("indexed", [False, True])
def test_moved_shards_are_the_same(
    trainer: Trainer, whole: Path, pairs: Path, run: Path, tmp_path: Path, indexed: bool
) -> None:
    shards = shutil.copytree(pairs, tmp_path / "elsewhere/shards")
    if indexed:
        index_shards(shards)
    same_run(trainer.finish(run, "--data.train", str(shards)), whole)


def test_what_changed_is_told_from_the_data_of_the_first_step(
    trainer: Trainer, pairs: Path, tmp_path: Path
) -> None:
    """A run that was killed before its first checkpoint may start over with other shards."""
    run, fewer = tmp_path / "run", shutil.copytree(pairs, tmp_path / "fewer")
    trainer.kill_at(1, run)
    without_a_shard(fewer)
    trainer.kill_at(3, run, "--data.train", str(fewer))
    error = trainer.refuse(run, "--data.train", str(pairs))
    assert f"{pairs}: 00002.tar is new" in error


@pytest.fixture(scope="module")
def damaged(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards with three pictures that cannot be decoded."""
    shards = shutil.copytree(pairs, tmp_path_factory.mktemp("damaged") / "shards")
    for name, places in {"00000.tar": (1, 6), "00002.tar": (3,)}.items():
        data = bytearray((shards / name).read_bytes())
        found = scan_shard(shards / name).samples
        for place in places:
            start = data.index(b"IDAT", found[place].header) + 8
            data[start : start + 8] = bytes(8)
        (shards / name).write_bytes(data)
    return shards


def quarantine(folder: Path) -> list[dict[str, Any]]:
    """The bad samples that a run or a checkpoint lists; none may be there twice."""
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return rows


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 3)])
def test_a_damaged_picture_is_listed_once_whoever_met_it(
    trainer: Trainer, damaged: Path, tmp_path: Path, ranks: tuple[int, int, int]
) -> None:
    options = "--data.train", str(damaged), "--data.batch-size", "6"
    uninterrupted, run = trainer.finish(tmp_path / "whole", *options), tmp_path / "run"
    expected = quarantine(uninterrupted)
    bad = [("00000.tar", 1), ("00000.tar", 6), ("00002.tar", 3)]
    assert [(row["shard"], row["index"]) for row in expected] == bad
    assert max(row["step"] for row in expected) < 7, "all were met before the last kill"
    assert quarantine(trainer.finish(tmp_path / "shared", *options, ranks=ranks[-1])) == expected
    for step, number in zip((3, 7), ranks, strict=False):
        trainer.kill_at(step, run, *options, ranks=number)
    assert quarantine(run / "checkpoints/step_00000006") == [row for row in expected if row["step"] < 6]
    trainer.finish(run, *options, ranks=ranks[-1])
    assert quarantine(run) == quarantine(run / "checkpoints/step_00000008") == expected
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, uninterrupted)]
    assert results[0]["faults"] == results[1]["faults"] == {"picture undecodable": 3}
    assert samples(run) == samples(uninterrupted)
    if set(ranks) == {1}:
        same_run(run, uninterrupted)


def opened(pid: int) -> set[str]:
    """The names of the shards that a process has open."""
    paths = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    return {os.path.basename(path) for path in paths if path.endswith(".tar")}


def test_a_shard_that_is_away_stops_the_run_and_changes_nothing(
    trainer: Trainer, pairs: Path, tmp_path: Path
) -> None:
    shards, run = shutil.copytree(pairs, tmp_path / "shards"), tmp_path / "run"
    options = "--data.train", str(shards), "--data.batch-size", "2", "--data.window", "2"
    uninterrupted = trainer.finish(tmp_path / "whole", *options)
    fault = {"at": "step", "step": 3, "do": "wait", "rank": 0}
    running = trainer.start(run, *options, fault=fault)
    names = {path.name for path in shards.glob("*.tar")}
    away = sorted(names - opened(running.waiting()["pid"]))
    assert away, "three steps have not opened every shard"
    for name in away:
        (shards / name).rename(tmp_path / name)
    running.release()
    assert running.codes() == [1], running.stderr()
    error = running.stderr()
    assert "clipkit: error: " in error
    assert any(f"{name}: cannot be opened" in error for name in away), error
    assert len(records(run)) < len(records(uninterrupted))
    assert f"{away[0]} is gone" in trainer.refuse(run, *options)
    for name in away:
        (tmp_path / name).rename(shards / name)
    same_run(trainer.finish(run, *options), uninterrupted)
    assert not (run / "quarantine.jsonl").exists()
