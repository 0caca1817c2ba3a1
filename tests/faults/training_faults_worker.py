"""The trainer in processes that die, or wait to be killed, where a test says.

A job is a `clipkit train` with a fault. As a server (`--serve`) this program imports torch once and forks a
process for each rank of each job that it reads from stdin; under torchrun it is one rank of one job. The
faults are wrapped around the trainer's own functions, in the forked process alone.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import clipkit_training.checkpoint
import clipkit_training.loop
import clipkit_training.run
from clipkit.cli import main
from clipkit_training.recipe import load_recipe
from clipkit_training.world import World, pick_device

Job = dict[str, Any]
"""`arguments` of `clipkit train`; `out`, a folder; `ranks`; `fault`, None or
`{"at": "step", "step": k, "do": "die" | "wait", "rank": r or None for all}`: before the k-th step, from 0; or
`{"at": "save", "step": k, "call": n}`: before the n-th call that writes, from 0, of a checkpoint; with a
call of −1 it lives, and says in `out/calls.json` which calls there were."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(out: Path, rank: int) -> None:
    """Say which processes there are, then wait for a signal or for `out/go`, but not forever."""
    workers = [child.pid for child in multiprocessing.active_children()]
    text = json.dumps({"pid": os.getpid(), "workers": workers})
    (out / f"part-{rank}").write_text(text)
    os.replace(out / f"part-{rank}", out / f"waiting-{rank}")
    end = time.monotonic() + 180
    while not (out / "go").exists():
        if time.monotonic() > end:
            die()
        time.sleep(0.02)


def fail_at_step(fault: Job, out: Path, rank: int) -> None:
    """Fail before a step is taken; its batch has been loaded."""
    take = clipkit_training.loop.Trainer._one_step

    def one_step(trainer: Any, batch: Any, done: float) -> dict[str, float]:
        if trainer.step == fault["step"]:
            die() if fault["do"] == "die" else wait(out, rank)
        return take(trainer, batch, done)

    setattr(clipkit_training.loop.Trainer, "_one_step", one_step)  # noqa: B010 (its signature is looser)


def fail_while_saving(fault: Job, out: Path) -> None:
    """Die before the n-th call that changes files while the checkpoint of one step is saved."""
    calls: list[str] | None = None

    def reach(call: str) -> None:
        if calls is not None:
            calls.append(call)
            if len(calls) - 1 == fault["call"]:
                die()

    def watch(module: Any, name: str, target: int) -> None:
        original = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            reach(f"{name} {_file_name(arguments[target])}")
            return original(*arguments, **options)

        setattr(module, name, watched)

    for module, name, target in (
        *((os, name, 0) for name in ("fsync", "unlink", "rmdir")),
        (os, "replace", 1),
        (clipkit_training.checkpoint, "save_file", 1),
    ):
        watch(module, name, target)
    save = clipkit_training.loop.save_checkpoint

    def save_checkpoint(run: Path, step: int, *rest: Any) -> Path:
        nonlocal calls
        if step == fault["step"]:
            calls = []
        folder = save(run, step, *rest)
        reach("end")
        if calls is not None:
            (out / "calls.json").write_text(json.dumps(calls))
        calls = None
        return folder

    clipkit_training.loop.save_checkpoint = save_checkpoint


def _file_name(target: Any) -> str:
    path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
    return os.path.basename(path)


def train(job: Job, rank: int) -> int:
    """One rank of a job, in this process."""
    fault, out = job.get("fault"), Path(job["out"])
    if fault and fault["at"] == "save":
        fail_while_saving(fault, out)
    elif fault and fault["rank"] in (None, rank):
        fail_at_step(fault, out, rank)
    return main(["train", *job["arguments"]])


def fork(work: Callable[[], int], out: Path, rank: int) -> int:
    """Run `work` in a new process, its output in files. Returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in enumerate((os.devnull, out / f"stdout-{rank}", out / f"stderr-{rank}")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
            os.dup2(os.open(name, flags, 0o644), number)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_job(job: Job) -> None:
    """Fork a job's ranks, and say their exit codes by rank when all have ended."""
    ranks, out = job["ranks"], Path(job["out"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if ranks > 1 else None

    def work(rank: int) -> int:
        if store is not None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
        return train(job, rank)

    pids = [fork(lambda rank=rank: work(rank), out, rank) for rank in range(ranks)]
    codes: dict[int, int] = {}
    while len(codes) < ranks:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:  # as torchrun does
            for other in pids:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    sys.stdout.write(json.dumps([codes[pid] for pid in pids]) + "\n")
    sys.stdout.flush()


def serve(recipe: str) -> None:
    """Run the jobs on stdin, a line of JSON each."""
    # What is only imported when a run starts is imported here, so that no job waits for it.
    clipkit_training.loop.Trainer(load_recipe(recipe), Path(), World(0, 1, pick_device("cpu"), None))
    for line in sys.stdin:
        run_job(json.loads(line))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(train(json.loads(Path(sys.argv[1]).read_text()), int(os.environ["RANK"])))
