"""What a run says while it runs: `metrics.jsonl`, TensorBoard, and one live line for people.

Every record carries the step, so a resumed run drops the records past its checkpoint and goes on.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from clipkit.cli.output import Task, progress
from clipkit.files import atomic_write

METRICS = "metrics.jsonl"


class RunLog:
    """Writes a run's records. Use as `with RunLog.open(run, first_step) as log`."""

    def __init__(self, run: Path, first_step: int, bar: Task) -> None:
        self._path = run / METRICS
        self._truncate(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self._bar = bar
        self._loss = self._judged = ""

    @classmethod
    @contextmanager
    def open(cls, run: Path, first_step: int, description: str) -> Iterator["RunLog"]:
        """The log of `run` from `first_step` on, with a progress bar over [0, 100] %."""
        with progress(description, total=100) as bar:
            log = cls(run, first_step, bar)
            try:
                yield log
            finally:
                log._file.close()
                log._board.close()

    def step(self, step: int, done: float, record: dict[str, Any]) -> None:
        """Record a training step; `done` is the share of the budget spent, in [0, 1]."""
        self._write("train", step, record)
        self._loss = f"loss {record['loss']:.3f} · {record['samples_per_second']:.0f} samples/s"
        self._bar.update(completed=round(100 * done), text=f"{self._loss}{self._judged}")

    def evaluation(self, step: int, done: float, record: dict[str, Any], words: str) -> None:
        """Record held-out figures; where no bar is drawn, say the most telling ones in a line."""
        self._write("heldout", step, record)
        self._judged = f" · {words}"
        if not sys.stderr.isatty():
            sys.stderr.write(f"step {step} ({done:.0%}): {self._loss}{self._judged}\n")
        self._bar.update(completed=round(100 * done), text=f"{self._loss}{self._judged}")

    def _write(self, kind: str, step: int, record: dict[str, Any]) -> None:
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **record}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in flat(record):
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def _truncate(self, first_step: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        if not self._path.is_file():
            return
        kept = [line for line in self._path.read_bytes().splitlines() if _upto(line, first_step)]
        atomic_write(self._path, b"".join(line + b"\n" for line in kept))


def _upto(line: bytes, step: int) -> bool:
    """Whether a line is a whole record of a step up to `step`; a crash may have cut it."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, those of records inside it under `outer/inner`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
