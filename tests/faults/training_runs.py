"""Runs of the trainer for tests: shards, a tiny recipe, processes that can be killed, what a run left.

`Trainer` is a server that forks each run (`training_faults_worker`). A run is told by what it wrote: the
checksum of each step's samples, its losses, and its weights.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from clipkit_data.shards.writing import entry, write_shard

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("training_faults_worker.py")
STEPS = 8

RECIPE = f"""
step: clip
max_steps: {STEPS}
precision: fp32
device: cpu
evaluations: 0
checkpoints: {STEPS // 2}
model:
  dim: 16
  image: {{name: cnn, widths: [8, 16], depths: [1, 1], stem: 2, groups: 4}}
  text: {{name: transformer, width: 16, layers: 1, heads: 2}}
  tokenizer: {{name: clip, context_length: 8}}
  preprocess: {{size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], resize: squash}}
data:
  train: TRAIN
  batch_size: 10
  captions: {{caption: 0.8, other: 0.2}}
  augment: {{rotate: 10, translate: 0.1, brightness: 0.2}}
optim: {{lr: 0.003, warmup_steps: 2}}
"""


def write_pairs(folder: Path, sizes: Sequence[int]) -> Path:
    """Shards of small pictures, each with a caption of its own."""
    folder.mkdir(parents=True)
    start = 0
    for shard, size in enumerate(sizes):
        numbers = range(start, start + size)
        write_shard((entry(f"{number:09d}", _sample(number)) for number in numbers), folder, f"{shard:05d}")
        start += size
    return folder


def _sample(number: int) -> dict[str, Any]:
    grey = np.outer(np.linspace(40, 200, 20), np.roll(np.linspace(0.2, 1, 20), number))
    pixels = np.stack([grey, np.full_like(grey, number * 37 % 256), grey.T], axis=-1).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    words = {"other": f"picture {number}"}
    return {"image": buffer.getvalue(), "ext": "png", "caption": f"number {number}", "json": words}


@dataclass
class Running:
    """A run that is going on; `waiting` and `codes` block until there is something to say."""

    out: Path
    server: "Trainer"

    def waiting(self, rank: int = 0) -> dict[str, Any]:
        """The process id of a rank that waits before a step (`pid`), and those of its `workers`."""
        return waiting(self.out, rank)

    def release(self) -> None:
        """Let the ranks go on."""
        (self.out / "go").touch()

    def codes(self) -> list[int]:
        """Exit code of each rank, when all have ended; −9 for one that was killed."""
        return self.server.read()

    def calls(self) -> list[str]:
        """The calls of the checkpoint that was watched; see the worker's `Job`."""
        return json.loads((self.out / "calls.json").read_text())

    def stderr(self, rank: int = 0) -> str:
        """What a rank had to say."""
        return (self.out / f"stderr-{rank}").read_text()


class Trainer:
    """A server that starts runs, one at a time, each in processes of its own."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        self.recipe, self.folder, self.started = recipe, folder, 0
        # Its own errors go to a file: a pipe that nobody reads would fill.
        with (folder / "server-stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER), "--serve", str(recipe)],
                cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True,
            )  # fmt: skip

    def start(self, run: Path, *options: str, **how: Any) -> Running:
        """Start a run, or resume it where the folder holds one; see `job`."""
        job = self.job(run, *options, **how)
        self.write(job)
        return Running(Path(job["out"]), self)

    def job(
        self,
        run: Path,
        *options: str,
        ranks: int = 1,
        fault: dict[str, Any] | None = None,
        recipe: Path | None = None,
    ) -> dict[str, Any]:
        """A `Job` for the worker, with a new folder for what it says."""
        self.started += 1
        out = self.folder / f"job-{self.started}"
        out.mkdir()
        resume = ["--resume"] if (run / "config.yaml").exists() else []
        arguments = [str(recipe or self.recipe), "--run-dir", str(run), *resume, *options]
        return {"arguments": arguments, "out": str(out), "ranks": ranks, "fault": fault}

    def write(self, job: dict[str, Any]) -> None:
        """Give the server a job."""
        assert self.process.stdin is not None
        assert self.process.poll() is None, self.errors()
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        """What the server itself had to say."""
        return (self.folder / "server-stderr").read_text()[-4000:]

    def read(self) -> list[int]:
        """The server's answer: the exit code of each rank of a job that has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors()
        return json.loads(line)

    def finish(self, run: Path, *options: str, **how: Any) -> Path:
        """Train or resume to the end. Returns the run folder."""
        running = self.start(run, *options, **how)
        codes = running.codes()
        assert not any(codes), "\n".join(map(running.stderr, range(len(codes))))
        return run

    def refuse(self, run: Path, *options: str, **how: Any) -> str:
        """What a run that must fail has to say: one line."""
        running = self.start(run, *options, **how)
        assert running.codes() == [1], running.stderr()
        lines = [line for line in running.stderr().splitlines() if line.startswith("clipkit: error: ")]
        assert len(lines) == 1, running.stderr()
        assert "Traceback" not in running.stderr()
        return lines[0]

    def kill_at(self, step: int, run: Path, *options: str, ranks: int = 1, **how: Any) -> None:
        """Train or resume until the last rank of the run is killed before a step."""
        fault = {"at": "step", "step": step, "do": "die", "rank": ranks - 1}
        running = self.start(run, *options, ranks=ranks, fault=fault, **how)
        assert running.codes()[-1] == -signal.SIGKILL, running.stderr(ranks - 1)


def environment() -> dict[str, str]:
    """Of every process here: one thread each."""
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "data", "training", "service"))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(recipe: Path, folder: Path) -> Iterator[Trainer]:
    """A `Trainer` that ends with the block."""
    trainer = Trainer(recipe, folder)
    with trainer.process:
        try:
            yield trainer
        finally:
            assert trainer.process.stdin is not None
            trainer.process.stdin.close()
            try:
                trainer.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                trainer.process.kill()


def torchrun(job: dict[str, Any]) -> subprocess.Popen[str]:
    """A job's ranks under the real launcher."""
    path = Path(job["out"]) / "job.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(job["ranks"]), str(WORKER), str(path)]
    with (path.parent / "stderr").open("wb") as errors:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=errors, stderr=errors, text=True
        )  # fmt: skip


def waiting(out: Path, rank: int) -> dict[str, Any]:
    """What a rank of a job says when it waits before a step: its `pid`, and those of its `workers`."""
    path, end = out / f"waiting-{rank}", time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, [item.read_text()[-2000:] for item in out.iterdir()]
        time.sleep(0.02)
    return json.loads(path.read_text())


def ended(pid: int) -> bool:
    """Whether a process is no more, or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for_end(pid: int, seconds: float = 60) -> None:
    """Wait until a process is no more."""
    end = time.monotonic() + seconds
    while not ended(pid):
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.05)


def records(run: Path) -> list[dict[str, Any]]:
    """What a run logged of each training step; the steps must be 1, 2, 3 …, each once."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return rows


def samples(run: Path) -> list[str]:
    """The checksum of each step's samples; they must differ, or they would say nothing."""
    found = [row["samples"] for row in records(run)]
    assert len(set(found)) == len(found)
    return found


def same_run(run: Path, whole: Path, steps: int = STEPS) -> None:
    """Assert that two runs took the same steps to the same weights, bit for bit."""
    assert len(samples(whole)) == steps
    assert samples(run) == samples(whole)
    assert [row["loss"] for row in records(run)] == [row["loss"] for row in records(whole)]
    mine, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
