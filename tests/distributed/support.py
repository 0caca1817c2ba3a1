"""Real gloo processes for a test: a script whose ranks save what they found, and a test that reads it.

A worker is a module with a function of (rank, group) and `launch(function, ranks)` at its end. Its test
imports it, to compute the same in one process, and gets what the ranks saved from `run`. Ranks are forked
from one process, so that torch is imported once, and meet through a file, so that there is no port to race
for.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

Work = Callable[[int, dist.ProcessGroup], Any]
ROOT = Path(__file__).parents[2]


def run(worker: ModuleType, folder: Path, ranks: int) -> list[Any]:
    """What each rank of a worker saved; a rank that fails shows its traceback."""
    path = os.pathsep.join(x for x in (str(ROOT), os.environ.get("PYTHONPATH", "")) if x)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    assert worker.__file__ is not None
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def launch(work: Work, ranks: int) -> None:
    """Run `work` on so many ranks; to be called where a worker is the main program."""
    start_processes(_rank, (work, ranks, Path(sys.argv[1])), nprocs=ranks, start_method="fork")


def _rank(rank: int, work: Work, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, wait = f"file://{folder / 'store'}", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=wait)
    group = dist.group.WORLD
    assert group is not None
    torch.save(work(rank, group), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
