"""The benchmarks run, and print their tables."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_losses_beside_open_clip(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    small = ["--n", "64", "96", "--rounds", "1", "--dtype", "float32", "--threads", "1"]
    printed = run(
        str(BENCHMARKS / "loss.py"), *small, "--methods", "clipkit", "open_clip", "--json", str(path)
    )
    assert "| 96 | float32 | open_clip |" in printed
    found = json.loads(path.read_text())
    assert [(row["n"], row["method"]) for row in found["rows"]] == [
        (n, name) for n in (64, 96) for name in ("clipkit", "open_clip")
    ]
    assert all(row["seconds"] > 0 and row["extra"] > 0 for row in found["rows"])
    assert all(row["gradient"] < 1e-5 for row in found["errors"])
    plot = tmp_path / "plot.svg"
    run(str(BENCHMARKS / "loss.py"), "--read", str(path), "--plot", str(plot))
    assert "<svg" in plot.read_text()


def test_losses_on_two_processes_beside_open_clip(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    small = ["--n", "64", "--world", "2", "--rounds", "1", "--repeats", "1", "--dtype", "float32"]
    printed = run(str(BENCHMARKS / "loss_distributed.py"), *small, "--json", str(path))
    for name in ("clipkit", "clipkit ring", "open_clip"):
        assert f"| 2 | float32 | {name} |" in printed


SMALL = ["--workers", "0", "--batch", "8", "--pictures", "8", "--rounds", "1", "--seconds", "0.1"]


def test_loaders_beside_webdataset_and_a_peer_that_is_not_installed(tmp_path: Path) -> None:
    path, plot = tmp_path / "runs.json", tmp_path / "plot.svg"
    methods = ["--methods", "clipkit", "webdataset", "energon", "--sizes", "640x480", "--geometry", "crop"]
    files = ["--folder", str(tmp_path / "sets"), "--json", str(path), "--plot", str(plot)]
    printed = run(str(BENCHMARKS / "loader.py"), *methods, *SMALL, *files)
    assert "| 640x480 | crop | 0 | energon | not installed: see --install |" in printed
    found = json.loads(path.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["clipkit", "webdataset", "energon"]
    for name in ("clipkit", "webdataset"):
        assert rows[name]["samples/s"] > 0
        assert rows[name]["samples/CPU s"] > 0
    assert rows["clipkit"]["samples/CPU s ÷ ours"] == 1
    (levels,) = found["pixels"]
    assert levels["pictures"] == 8
    assert levels["largest"] <= 2
    assert levels["beyond one"] <= 8  # of 150,528 values in each
    assert levels["share"] < 0.01
    assert "<svg" in plot.read_text()


def test_methods_beside_lightly(tmp_path: Path) -> None:
    path, plot = tmp_path / "runs.json", tmp_path / "plot.svg"
    small = ["--methods", "moco_v2", "--data", "digits", "--seeds", "1", "--steps", "3", "--batch", "32"]
    files = ["--json", str(path), "--plot", str(plot)]
    printed = run(str(BENCHMARKS / "methods.py"), *small, "--threads", "1", *files)
    assert "| digits | moco_v2 | lightly |" in printed
    found = json.loads(path.read_text())
    assert [row["side"] for row in found["rows"]] == ["clipkit", "lightly"]
    for row in found["rows"]:
        assert row["samples/s"] > 0
        assert 0 < row["knn"] <= 1
    assert found["runs"][0]["raw"]["knn"] > 0.9, "digits are easy"
    assert "<svg" in plot.read_text()


def test_time_to_the_first_batch_of_many_shards(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    small = ["--startup", "--shards", "20", "--batch", "8", "--rounds", "1"]
    files = ["--folder", str(tmp_path / "sets"), "--json", str(path)]
    run(str(BENCHMARKS / "loader.py"), *small, "--methods", "clipkit", *files)
    found = json.loads(path.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    for name in ("clipkit", "clipkit, no index"):
        assert rows[name]["runs"][0]["samples"] == 320
        assert rows[name]["first"] > 0
        assert rows[name]["resume"] > 0
    assert found["order"]["samples"] == 2_000_000_000
    assert found["order"]["extra"] < 1e9


def test_the_time_of_workers_counts_while_they_live_and_after() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass\nprint(1, flush=True)\ninput()"
    script = f"""
import subprocess, sys
from loader_peers.measure import cpu_seconds
before, pipe = cpu_seconds(), subprocess.PIPE
child = subprocess.Popen([sys.executable, "-c", {burn!r}], stdin=pipe, stdout=pipe)
child.stdout.readline()
alive = cpu_seconds() - before
child.communicate(b"1")
print(alive, cpu_seconds() - before)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    alive, after = map(float, done.stdout.split())
    assert alive >= 0.45
    assert after >= alive
