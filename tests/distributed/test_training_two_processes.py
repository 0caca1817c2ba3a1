"""Training on two gloo processes is training on one: same global batch, loss and gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("training_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.parametrize(("step", "batch"), [("clip", 24), ("clip", 25), ("siglip", 24)])
def test_loss_and_gradients_equal_one_process(
    tiny_recipe: Path, tmp_path: Path, step: str, batch: int
) -> None:
    tiny_recipe.write_text(tiny_recipe.read_text().replace("batch_size: 24", f"batch_size: {batch}"))
    if step == "siglip":
        text = tiny_recipe.read_text().replace("step: clip", "step: siglip")
        tiny_recipe.write_text(text.replace("  dim: 32", "  dim: 32\n  scoring: sigmoid"))
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    run([sys.executable, str(WORKER), str(tiny_recipe), str(one)], tmp_path)
    run([*LAUNCH, str(WORKER), str(tiny_recipe), str(two)], tmp_path)
    expected, actual = load_file(one), load_file(two)
    assert set(expected) == set(actual)
    assert any("log_scale" in name for name in expected)
    largest = max(float(tensor.abs().max()) for name, tensor in expected.items() if name != "loss")
    for name in expected:
        error = float((actual[name] - expected[name]).abs().max())
        assert error <= 1e-6 * max(1.0, largest), f"{name}: off by {error} (largest gradient {largest})"


def test_torchrun_trains_the_same_model(tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = ["-m", "clipkit_training", str(tiny_recipe), "--json"]
    one = run([sys.executable, *arguments, "--run-dir", "one"], tmp_path)
    two = run([*LAUNCH, *arguments, "--run-dir", "two"], tmp_path)
    results = [json.loads(done.stdout.splitlines()[-1]) for done in (one, two)]
    assert "Warning" not in two.stderr
    assert [result["processes"] for result in results] == [1, 2]
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if row["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-6)
    assert (tmp_path / "two/model/clipkit.json").is_file()
