"""The CLIP loss over processes: seconds, memory of a rank, bytes sent and gradients, beside open_clip's.

    python benchmarks/loss_distributed.py               # 2 and 4 processes, N = 8192: some eight minutes

Each case is W gloo processes of one thread on this machine, which share a batch of N rows equally: once for
the gradients, once for the memory at the peak of a rank (beyond inputs and libraries; the largest of the
ranks), once to warm up, then timed. open_clip runs as it must to be exact: `local_loss` and
`gather_with_grad`. In a round every method runs once in turn; the figures are medians over the rounds, with
`steal` as in loss.py. Sent MB are what the loopback device counts in a step, less what the barriers around it
send, for each rank. With more ranks than cores the seconds say little but which is more.

Errors are relative to the largest value of one process's float64 loss or gradient of the whole batch. As
after DDP's mean, gradients of features are 1/W of a rank's own, and that of the scale the mean over ranks.

Shapes: N = rows of all ranks, B = N / W rows of a rank, D = 512 features.
"""

import argparse
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss import DTYPES, D, Loss, dense, inputs
from machine import number, ratio, relative_error
from torch import Tensor

KEYS, ERRORS = ("seconds", "extra", "sent"), ("loss", "gradient", "scale")


def clipkit_loss(exchange: str) -> Loss:
    from clipkit.losses import clip_loss

    options: dict[str, Any] = {"exchange": exchange} if can_choose_exchange() else {}
    return lambda x, y, scale: clip_loss(x, y, scale=scale, group=dist.group.WORLD, **options)


def can_choose_exchange() -> bool:
    from clipkit.losses import clip_loss

    return "exchange" in inspect.signature(clip_loss).parameters


def open_clip_loss() -> Loss:
    from open_clip.loss import ClipLoss

    rank, world = dist.get_rank(), dist.get_world_size()
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    return lambda x, y, scale: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale)


METHODS: dict[str, Callable[[], Loss]] = {
    "clipkit": partial(clipkit_loss, "gather"),
    **({"clipkit ring": partial(clipkit_loss, "ring")} if can_choose_exchange() else {}),
    "open_clip": open_clip_loss,
}


def sent() -> int:
    """Bytes sent over the loopback device so far; 0 where the system does not tell."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[9]) for line in lines if line.strip().startswith("lo:")), 0)


def step_of(loss: Loss, leaves: list[Tensor]) -> None:
    loss(leaves[0], leaves[1], leaves[2]).backward()
    for leaf in leaves:
        leaf.grad = None


def timed(step: Callable[[], object]) -> tuple[float, int]:
    """Seconds until every rank is done, and bytes sent meanwhile by all of them."""
    dist.barrier()
    before, start = sent(), time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start, sent() - before


def errors(loss: Loss, leaves: list[Tensor], rows: slice, exact: dict[str, Tensor]) -> dict[str, float]:
    """Of the mean of the losses, of this rank's features, and of the mean gradient of the scale."""
    world = dist.get_world_size()
    value = loss(leaves[0], leaves[1], leaves[2])
    x, y, scale = torch.autograd.grad(value, leaves)
    mean = torch.stack([value.detach().double(), scale.double()])
    dist.all_reduce(mean)
    of_loss, of_scale = (
        relative_error(m / world, exact[name]) for m, name in zip(mean, ("loss", "scale"), strict=True)
    )
    of_x, of_y = (
        float((found.double() / world - exact[name][rows]).abs().max() / exact[name].abs().max())
        for name, found in (("x", x), ("y", y))
    )
    return {"loss": of_loss, "gradient": max(of_x, of_y), "scale": of_scale}


def child(case: dict[str, Any]) -> dict[str, Any]:
    """One rank of one case."""
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the device whose bytes are counted
    rank, world, n = case["rank"], case["world"], case["n"]
    store = f"file://{case['folder']}/{case['store']}"
    wait = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=wait)
    loss = METHODS[case["method"]]()
    rows = slice(rank * n // world, (rank + 1) * n // world)
    x_ND, y_ND, scale = inputs(n, case["dtype"])
    leaves = [x_ND[rows].detach().clone(), y_ND[rows].detach().clone(), scale.detach()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    del x_ND, y_ND
    exact = torch.load(f"{case['folder']}/{case['dtype']}.pt", weights_only=True)
    found: dict[str, Any] = errors(loss, leaves, rows, exact)
    del exact
    step = partial(step_of, loss, leaves)
    dist.barrier()
    found["extra"] = machine.extra_memory(step)
    machine.keep_freed_memory()
    step()
    idle = median(timed(lambda: None)[1] for _ in range(case["repeats"]))
    before = machine.cpu_times()
    steps = [timed(step) for _ in range(case["repeats"])]
    found["steal"] = machine.steal_since(before)
    found["seconds"] = median(seconds for seconds, _ in steps)
    found["sent"] = max(0.0, median(bytes_ for _, bytes_ in steps) - idle) / world
    dist.barrier()
    dist.destroy_process_group()
    return found


def save_reference(folder: Path, n: int, dtype: str) -> None:
    """Loss and gradients of one process in float64, from the same (rounded) inputs."""
    x, y, scale = (leaf.detach().double().requires_grad_() for leaf in inputs(n, dtype))
    value = dense(x, y, scale)
    gradients = torch.autograd.grad(value, (x, y, scale))
    exact = dict(zip(("x", "y", "scale"), gradients, strict=True))
    torch.save({**exact, "loss": value.detach()}, folder / f"{dtype}.pt")


def start(args: argparse.Namespace, folder: Path, world: int, dtype: str, method: str) -> dict[str, Any]:
    """All ranks of one case: times of the first, which waits for the others, and the worst of the rest."""
    case = {"world": world, "n": args.n, "dtype": dtype, "method": method, "threads": 1}
    case |= {"folder": str(folder), "store": f"store{time.monotonic_ns()}", "repeats": args.repeats}
    processes = [machine.launch(__file__, {**case, "rank": rank}) for rank in range(world)]
    ranks = []
    for process in processes:
        ranks.append(machine.finish(process))
        if "problem" in ranks[-1]:
            for other in processes:
                other.kill()
            for other in processes:
                other.wait()
            return ranks[-1]
    worst = {key: max(rank[key] for rank in ranks) for key in (*ERRORS, "steal")}
    extra = [rank["extra"] for rank in ranks if rank["extra"] is not None]
    return {**ranks[0], **worst, "extra": max(extra, default=None)}


def measured(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A table of medians, printed as it grows; its rows, and every run behind them."""
    columns = ["W", "dtype", "method", "seconds", "÷ ours", "peak extra MB", "÷ ours", "sent MB", "÷ ours"]
    table = machine.Table(*columns, "error of loss", "of gradient", "of d(scale)", "steal")
    rows, every = list[Any](), list[Any]()
    for dtype in args.dtype:
        save_reference(folder, args.n, dtype)
    for world, dtype in product(args.world, args.dtype):
        runs = machine.alternate(args.methods, args.rounds, partial(start, args, folder, world, dtype))
        every += [{"world": world, "dtype": dtype, "method": m, **run} for m in runs for run in runs[m]]
        for method, row in machine.compare(runs, KEYS + ERRORS, dict.fromkeys(METHODS, "clipkit")).items():
            rows.append({"world": world, "dtype": dtype, "method": method, **row})
            if "problem" in row:
                table.add(world, dtype, method, row["problem"])
                continue
            cells = []
            for key, unit in zip(KEYS, (1, 1e6, 1e6), strict=True):
                cells += [number(ratio(row[key], unit)), number(row[f"{key} ÷ ours"])]
            cells += [number(row[key]) for key in ERRORS]
            table.add(world, dtype, method, *cells, number(100 * row["steal"], " %") + row["mark"])
    return rows, every


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--n", type=int, default=8192, help="rows of all ranks together")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps in a run")
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    uneven = [world for world in args.world if args.n % world]
    if uneven:
        raise SystemExit(f"loss_distributed.py: {args.n} rows do not divide among {uneven[0]} processes")
    host = machine.describe("torch", "open_clip_torch")
    print(f"{host}; N = {args.n}, D = {D}, one thread for each rank")
    with tempfile.TemporaryDirectory() as folder:
        rows, runs = measured(args, Path(folder))
    machine.save_json(args.json, machine=host, n=args.n, rows=rows, runs=runs)
    if any("problem" in row for row in rows):
        raise SystemExit("loss_distributed.py: a case failed, see the table")


if __name__ == "__main__":
    main()
