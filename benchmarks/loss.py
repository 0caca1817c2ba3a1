"""Contrastive losses, forward and backward: seconds, peak memory and gradient error, beside their peers'.

    python benchmarks/loss.py --plot loss.svg                   # some twelve minutes on two cores
    python benchmarks/loss.py --rounds 3 --n 256 1024 2048 4096 8192 16384 32768 65536      # hours
    python benchmarks/loss.py --device cuda

The peers are open_clip's `ClipLoss`, a dense loss of a few lines, and for two views NTXentLoss of lightly and
of pytorch-metric-learning. Each case runs in a process of its own: one call for the memory (the peak beyond
inputs and libraries; the inputs' gradients count), a warm-up, and the timed calls. In a round every method
runs once in turn; figures are medians over the rounds. `steal` is the share of CPU time that the hypervisor
took away: runs above 10 % are left out of the medians, and where there are no others the row is marked †.
A case that does not fit into memory, or is estimated not to, says so. MB = 10⁶ bytes.

Shapes: N = rows of each view, D = 512 features.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
import torch.nn.functional as F
from machine import number, ratio, relative_error
from torch import Tensor

D, SCALE, TEMPERATURE = 512, 1 / 0.07, 0.1
N_CPU, N_CUDA = [256, 2048, 8192], [4096, 16384, 32768, 65536, 131072, 262144, 1048576]
INF_CL_GB = {32768: 0.18, 65536: 0.36, 131072: 0.72, 262144: 1.45}  # Inf-CL paper, ViT-L/14 on 8 × A800
DTYPES = ("float32", "bfloat16")
Rows = list[dict[str, Any]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(x_ND: Tensor, y_ND: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE as one writes it down."""
    logits_NN = scale * F.normalize(x_ND, dim=-1) @ F.normalize(y_ND, dim=-1).T
    target_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2


def dense_two_views(x_ND: Tensor, y_ND: Tensor, scale: Tensor) -> Tensor:
    """NT-Xent as one writes it down: the reference of the gradients."""
    z_2ND = F.normalize(torch.cat([x_ND, y_ND]), dim=-1)
    n, rows = len(x_ND), torch.arange(len(z_2ND), device=z_2ND.device)
    logits = (z_2ND @ z_2ND.T / TEMPERATURE).masked_fill(rows[:, None] == rows, -torch.inf)
    return F.cross_entropy(logits, rows.roll(n))


@dataclass(frozen=True)
class Method:
    """Where a loss is, how to call it, what it keeps at its peak, and which of ours it is compared with.

    `bytes_per_score` is for float32, as seen at N = 4096; bfloat16 needs half. There are N² scores, and for
    pytorch-metric-learning, which compares every positive pair with every negative pair, 8 N³.
    """

    home: str
    call: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    bytes_per_score: float = 0.0
    ours: str = "clipkit"
    cubic: bool = False

    def load(self) -> Loss:
        module, name = self.home.split(":")
        return partial(self.call, getattr(import_module(module), name))

    def need(self, n: int, dtype: str) -> float:
        """Estimated bytes."""
        scores = 8 * n**3 if self.cubic else n * n
        return scores * self.bytes_per_score * (0.5 if dtype == "bfloat16" else 1.0)

    def flops(self, n: int) -> int:
        """Scores, once more in backward, and two products for the gradients: 8 M² D for M rows."""
        return 8 * (n if self.ours == "clipkit" else 2 * n) ** 2 * D


def _unit(x_ND: Tensor) -> Tensor:
    return F.normalize(x_ND, dim=-1)


TWO = "clipkit nt_xent"
METHODS = {
    "clipkit": Method("clipkit.losses:clip_loss", lambda f, x, y, s: f(x, y, scale=s)),
    "open_clip": Method("open_clip.loss:ClipLoss", lambda f, x, y, s: f()(_unit(x), _unit(y), s), 18),
    "dense": Method("loss:dense", lambda f, x, y, s: f(x, y, s), 18),
    TWO: Method("clipkit.losses:nt_xent_loss", lambda f, x, y, s: f(x, y, temperature=TEMPERATURE), ours=TWO),
    "lightly": Method("lightly.loss:NTXentLoss", lambda f, x, y, s: f(TEMPERATURE)(x, y), 68, ours=TWO),
    "pytorch-metric-learning": Method(
        "pytorch_metric_learning.losses:NTXentLoss",
        lambda f, x, y, s: f(TEMPERATURE)(torch.cat([x, y]), torch.arange(len(x), device=x.device).repeat(2)),
        18, TWO, cubic=True,
    ),
}  # fmt: skip


def inputs(n: int, dtype: str, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Pairs with a cosine of 0.29 on average (others: 0 ± 0.04), and the scale; all three are leaves."""
    random = torch.Generator(device).manual_seed(0)
    x_ND = torch.randn(n, D, generator=random, device=device)
    y_ND = x_ND * 0.3 + torch.randn(n, D, generator=random, device=device)
    kind, scale = getattr(torch, dtype), torch.tensor(SCALE, device=device)
    return x_ND.to(kind).requires_grad_(), y_ND.to(kind).requires_grad_(), scale.requires_grad_()


def measure(loss: Loss, case: dict[str, Any]) -> dict[str, Any]:
    """The memory at the peak of a call, and the median seconds of some."""
    n, dtype, device = case["n"], case["dtype"], case["device"]
    leaves, warm = inputs(n, dtype, device), n if device == "cuda" else min(n, 256)
    loss(*inputs(warm, dtype, device)).backward()  # what libraries set up once is not counted

    def step() -> float:
        machine.wait(device)
        start = time.perf_counter()
        loss(*leaves).backward()
        machine.wait(device)
        taken = time.perf_counter() - start
        for leaf in leaves:
            leaf.grad = None
        return taken

    extra = machine.extra_memory(step, device)
    machine.keep_freed_memory()
    before, first = machine.cpu_times(), step()
    seconds = [step() if first < case["seconds"] else first]  # a call as long as that needs no warm-up
    while len(seconds) < case["repeats"] and sum(seconds) < case["seconds"]:
        seconds.append(step())
    steal, calls = machine.steal_since(before), len(seconds)
    return {"seconds": median(seconds), "calls": calls, "extra": extra, "steal": steal}


def errors(loss: Loss, case: dict[str, Any]) -> dict[str, Any]:
    """Errors of the loss and of the gradients against those in float64 of the same (rounded) inputs."""
    leaves = inputs(case["n"], case["dtype"], case["device"])
    x, y, scale = (leaf.detach().double().requires_grad_() for leaf in leaves)
    exact = (dense if METHODS[case["method"]].ours == "clipkit" else dense_two_views)(x, y, scale)
    value = loss(*leaves)
    grads = [torch.autograd.grad(value, leaves, allow_unused=True)]
    grads.append(torch.autograd.grad(exact, (x, y, scale), allow_unused=True))
    wrong = [relative_error(a, b) for a, b in zip(*grads, strict=True) if a is not None]
    of_scale = wrong[2] if len(wrong) == 3 else None  # with a fixed temperature there is none
    return {"loss": relative_error(value, exact.detach()), "gradient": max(wrong[:2]), "scale": of_scale}


def probe() -> dict[str, Any]:
    """The accelerator's name and memory, and the FLOP/s of a product of 8192² matrices in each dtype."""
    from torch.utils.benchmark import Timer

    memory = torch.cuda.get_device_properties(0).total_memory
    found: dict[str, Any] = {"name": torch.cuda.get_device_name(), "memory": memory}
    for dtype in DTYPES:
        a, b = (torch.randn(8192, 8192, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
        timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b})
        found[dtype] = 2 * 8192**3 / timer.blocked_autorange(min_run_time=1.0).median
    return found


def child(case: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(case["threads"])
    if case["job"] == "probe":
        return probe()
    loss = METHODS[case["method"]].load()
    if case["device"] == "cpu":
        machine.limit_memory(int(case["limit"]))
    return {"measure": measure, "errors": errors}[case["job"]](loss, case)


def start(args: argparse.Namespace, limit: float, job: str, n: int, dtype: str, name: str) -> dict[str, Any]:
    """Run one case, unless its scores cannot fit."""
    need = METHODS[name].need(n, dtype)
    if need > limit:
        return {"problem": f"{machine.DOES_NOT_FIT}: about {number(need / 1e9)} GB"}
    case = {"job": job, "method": name, "n": n, "dtype": dtype, "limit": limit}
    case |= {key: getattr(args, key) for key in ("device", "threads", "repeats", "seconds")}
    return machine.finish(machine.launch(__file__, case))


def gradient_errors(args: argparse.Namespace, limit: float) -> Rows:
    table = machine.Table("dtype", "method", "N", "error of loss", "of gradient", "of d(scale)")
    rows = list[Any]()
    for dtype, name in product(args.dtype, args.methods):
        n = 256 if METHODS[name].cubic else 1024
        found = start(args, limit, "errors", n, dtype, name)
        rows.append({"dtype": dtype, "method": name, "n": n, **found})
        values = [number(found.get(key)) for key in ("loss", "gradient", "scale")]
        table.add(dtype, name, n, *([found["problem"]] if "problem" in found else values))
    return rows


def timings(args: argparse.Namespace, limit: float, chip: dict[str, Any]) -> tuple[Rows, Rows]:
    """A table of medians, printed as it grows; its rows, and every run behind them."""
    columns = ["N", "dtype", "method", "seconds", "÷ ours", "peak extra MB", "÷ ours", "steal"]
    table = machine.Table(*columns, *(["TFLOP/s", "of matrix peak"] if chip else []))
    ours = {name: method.ours for name, method in METHODS.items()}
    rows, every = list[Any](), list[Any]()
    for n, dtype in product(args.n, args.dtype):
        runs = machine.alternate(args.methods, args.rounds, partial(start, args, limit, "measure", n, dtype))
        every += [{"n": n, "dtype": dtype, "method": name, **run} for name in runs for run in runs[name]]
        for name, row in machine.compare(runs, ("seconds", "extra"), ours).items():
            rows.append({"n": n, "dtype": dtype, "method": name, **row})
            if "problem" in row:
                table.add(n, dtype, name, row["problem"])
                continue
            cells = [number(row["seconds"]), number(row["seconds ÷ ours"]), number(ratio(row["extra"], 1e6))]
            cells += [number(row["extra ÷ ours"]), number(100 * row["steal"], " %") + row["mark"]]
            if chip:
                speed = METHODS[name].flops(n) / row["seconds"]
                cells += [number(speed / 1e12), number(100 * speed / chip[dtype], " %")]
            table.add(n, dtype, name, *cells)
    return rows, every


def verdict(rows: Rows, inf_cl: bool) -> None:
    """In words: what each peer needs as a multiple of ours; and Inf-CL's published memory beside ours."""
    print("\nPeers as multiples of clipkit (time, memory):")
    for row in rows:
        if METHODS[row["method"]].ours != row["method"] and row["seconds ÷ ours"]:
            times = f"{number(row['seconds ÷ ours'])} ×, {number(row['extra ÷ ours'])} ×"
            print(f"- N = {row['n']}, {row['dtype']}, {row['method']}: {times}{row['mark']}")
    if inf_cl:
        print("\nMemory of the loss on each of 8 × A800 that share the global batch N, from Inf-CL's paper")
        print("(arXiv 2410.17243, ViT-L/14), beside ours for all of N on one device:")
        table = machine.Table("N", "dtype", "Inf-CL, GB on each", "clipkit, GB on one", "clipkit ÷ Inf-CL")
        for row in (row for row in rows if row["method"] == "clipkit" and row["n"] in INF_CL_GB):
            mine, theirs = ratio(row.get("extra"), 1e9), INF_CL_GB[row["n"]]
            table.add(row["n"], row["dtype"], theirs, number(mine), number(ratio(mine, theirs)))


def draw(path: Path, rows: Rows) -> None:
    """Time and memory against N, a colour for each method, bfloat16 dashed."""
    panels = {}
    for key, unit, title in (("seconds", 1.0, "seconds"), ("extra", 1e6, "peak extra MB")):
        lines = []
        for (colour, name), dtype in product(enumerate(METHODS), DTYPES):
            here = [row for row in rows if (row["method"], row["dtype"]) == (name, dtype) and row.get(key)]
            points = [(row["n"], row[key] / unit) for row in here]
            lines.append(machine.Line(f"{name}, {dtype}", colour, dtype == "bfloat16", points))
        panels[f"{title}, forward + backward"] = [line for line in lines if line.points]
    machine.plot(path, "N", panels)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", help=f"default {N_CPU}, on cuda {N_CUDA}")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls in a run, at most")
    parser.add_argument("--seconds", type=float, default=3.0, help="no further call after so many")
    parser.add_argument("--limit-gb", type=float, help="default 20, on cuda 90 %% of its memory")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--infcl", action="store_true", help="compare with Inf-CL's figures on the CPU, too")
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--read", type=Path, nargs="+", help="only plot what --json wrote; later files win")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    if args.read:
        read = [row for path in args.read for row in json.loads(path.read_text())["rows"]]
        kept = {(row["method"], row["dtype"], row["n"]): row for row in read}
        draw(args.plot, sorted(kept.values(), key=lambda row: row["n"]))
        return
    args.n = args.n or (N_CPU if args.device == "cpu" else N_CUDA)
    chip, limit = {}, 1e9 * (args.limit_gb or 20)
    host = machine.describe("torch", "open_clip_torch", "lightly", "pytorch-metric-learning")
    if args.device == "cpu":
        limit = min(limit, 0.8 * (machine.available_memory() or limit))
    else:
        chip = machine.finish(machine.launch(__file__, {"job": "probe", "threads": args.threads}))
        if "problem" in chip:
            raise SystemExit(f"loss.py: no GPU to measure, {chip['problem']}")
        peaks = " and ".join(f"{number(chip[dtype] / 1e12)} TFLOP/s ({dtype})" for dtype in DTYPES)
        host += f", {chip['name']}, products of 8192² matrices at {peaks}"
        limit = limit if args.limit_gb else 0.9 * chip["memory"]
    print(f"{host}; {args.threads} threads, D = {D}, limit {number(limit / 1e9)} GB")
    wrong = gradient_errors(args, limit)
    rows, runs = timings(args, limit, chip)
    verdict(rows, args.infcl or bool(chip))
    machine.save_json(args.json, machine=host, limit=limit, chip=chip, errors=wrong, rows=rows, runs=runs)
    if args.plot:
        draw(args.plot, rows)
    if any(str(row.get("problem")).startswith("failed") for row in wrong + rows):
        raise SystemExit("loss.py: a case failed, see the tables")


if __name__ == "__main__":
    main()
