"""The benchmarks of the losses run, print their tables, and agree with one process."""

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
