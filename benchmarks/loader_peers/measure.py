"""What a child process measures: speed of a loader, pixels, time to the first batch, memory of the order.

The one idea: CPU time is that of the process and of all its descendants, from the kernel's own books, between
two batches that the same worker made, so that what is half done weighs the same at both ends.

Shapes: B pictures, S side in pixels, N samples.
"""

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
from loader_peers.pipelines import PIPELINES, SIDE, clipkit
from loader_peers.sets import Set, linked, many_shards, speed_set

PROC = Path("/proc")
ORDER_SHARDS, ORDER_PER_SHARD, ORDER_BATCH = 200_000, 10_000, 32_768  # 2 · 10⁹ samples


def the_set(case: dict[str, Any]) -> Set:
    return speed_set(Path(case["root"]), case["size"], case["pictures"])


def _stat(process: str) -> list[str]:
    """The fields of /proc/PID/stat from the third on; empty for a process that has ended meanwhile."""
    with suppress(OSError):
        return (PROC / process / "stat").read_text().rpartition(")")[2].split()
    return []


def descendants() -> list[int]:
    """Processes below this one."""
    found = [(int(name), _stat(name)) for name in os.listdir(PROC) if name.isdigit()]
    parents = {process: int(fields[1]) for process, fields in found if fields}
    below = [os.getpid()]
    for process in below:
        below += [child for child, parent in parents.items() if parent == process]
    return below[1:]


def cpu_seconds() -> float:
    """User and system time of this process and its descendants, also of those that have ended."""
    every = [_stat(str(process)) for process in (os.getpid(), *descendants())]
    return sum(int(tick) for fields in every for tick in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def speed(case: dict[str, Any]) -> dict[str, Any]:
    """Samples per second and per CPU second once every worker has made a batch."""
    batches = PIPELINES[case["method"]](the_set(case), case["geometry"], case["batch"], case["workers"])
    turn = max(1, case["workers"])
    images, ids = next(batches)
    assert tuple(images.shape) == (case["batch"], 3, SIDE, SIDE), images.shape
    assert ids.ndim == 2, ids.shape
    assert len(ids) == case["batch"], ids.shape
    for _ in range(turn - 1):
        next(batches)
    before, cpu, start, count = machine.cpu_times(), cpu_seconds(), time.perf_counter(), 0
    while count % turn or time.perf_counter() - start < case["seconds"]:
        next(batches)
        count += 1
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    done = count * case["batch"]
    return {
        "samples/s": done / wall,
        "samples/CPU s": done / cpu,
        "samples": done,
        "dtype": str(images.dtype),
        "steal": machine.steal_since(before),
    }


def pixels(case: dict[str, Any]) -> dict[str, Any]:
    """Levels between clipkit's pixels for evaluation and those of open_clip's transform."""
    import torch
    from open_clip.transform import image_transform
    from torchvision.transforms.v2.functional import pil_to_tensor

    from clipkit.images import Preprocess, decode_image
    from clipkit_data.batches.pairs import EvalBatches
    from clipkit_data.dataset import ShardDataset

    dataset = ShardDataset(the_set(case).paths)
    theirs: Any = image_transform(SIDE, is_train=False)
    *geometry, _, _ = theirs.transforms  # without the conversion to floats and the normalisation
    counts = torch.zeros(256, dtype=torch.int64)  # of the values that differ by 0, 1, 2, … levels
    count = 0
    for batch in EvalBatches(dataset, Preprocess(size=SIDE), batch_size=64, limit=case["pictures"]):
        for mine in batch.images:
            image = decode_image(dataset[count].image)
            for step in geometry:
                image = step(image)
            levels = (mine.to(torch.int16) - pil_to_tensor(image).to(torch.int16)).abs()
            counts += levels.flatten().to(torch.int64).bincount(minlength=256)
            count += 1
    largest, share = int(counts.nonzero().max()), 1 - float(counts[0] / counts.sum())
    return {"pictures": count, "largest": largest, "share": share, "beyond one": int(counts[2:].sum())}


def startup(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds from imported libraries to the first batch of many shards, from the start and from 90 %."""
    made, method = many_shards(Path(case["root"]), case["shards"]), case["method"]
    batch = min(case["batch"], made.samples)
    if method == "clipkit, no index":
        made = replace(made, folder=linked(made, "bare"))
    pipeline = clipkit if method.startswith("clipkit") else PIPELINES[method]
    tiny = speed_set(Path(case["root"]), "64x64", 16)
    next(pipeline(tiny, "centre", 16, 0))  # imports and the tokenizer's vocabulary
    before, found = machine.cpu_times(), {}
    for name, step in (("first", 0), ("resume", int(0.9 * made.samples / batch))):
        if step and pipeline is not clipkit:
            found[name] = None  # it resumes at the start of an epoch
            continue
        start = time.perf_counter()
        batches = clipkit(made, "centre", batch, 0, step) if step else pipeline(made, "centre", batch, 0)
        next(batches)
        found[name] = time.perf_counter() - start
    return {**found, "samples": made.samples, "steal": machine.steal_since(before)}


def order(_: dict[str, Any]) -> dict[str, Any]:
    """Memory and time of the order of 2 · 10⁹ samples: building it, and some batches far apart."""
    import numpy as np

    from clipkit_data.batches.order import Order, Plan, Source

    seconds = list[float]()

    def build() -> None:
        sizes = np.full(ORDER_SHARDS, ORDER_PER_SHARD)
        start = time.perf_counter()
        plan = Plan([Source(Order(sizes, seed=0, lanes=64, window=8192))], ORDER_BATCH)
        for step in (0, 1, 2, 30_000, 30_001, 55_000):
            assert len(plan.batch(step).shard) == ORDER_BATCH
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()

    before, extra = machine.cpu_times(), machine.extra_memory(build)
    found = {"extra": extra, "first": seconds[0], "next": seconds[2], "steal": machine.steal_since(before)}
    return {**found, "samples": ORDER_SHARDS * ORDER_PER_SHARD}


def prepare(case: dict[str, Any]) -> dict[str, Any]:
    """The shards of a case; nothing is measured."""
    made = many_shards(Path(case["root"]), case["shards"]) if "shards" in case else the_set(case)
    return {"samples": made.samples, "bytes": sum(path.stat().st_size for path in made.paths)}


JOBS = {job.__name__: job for job in (speed, pixels, startup, order, prepare)}


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case; after `limit` seconds the process ends, whatever a peer does. Then call `leave`."""

    def stop(*_: object) -> None:
        print(f"no result after {case['limit']} s", file=sys.stderr)
        leave(1)  # as SystemExit, which no peer takes for a bad sample

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(case["limit"])
    return JOBS[case["job"]](case)


def leave(code: int) -> None:
    """End this process and its workers soon: endless loaders know no good moment to stop.

    Peers tidy up at exit, so that is given some seconds; workers would first finish what they are at.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for a failure
    for worker in multiprocessing.active_children():
        worker.kill()
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    signal.alarm(10)
    sys.exit(code)
