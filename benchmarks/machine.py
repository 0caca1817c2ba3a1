"""What the benchmarks share: stolen CPU time, peak memory, child processes, Markdown tables and plots.

The one idea: a figure stands beside the state of the machine that gave it, so every case runs in a process of
its own, which reports its memory from an untouched start and the CPU time that others took meanwhile. Run as
a script, this file prints the machine's description.
"""

import ctypes
import gc
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STEAL_LIMIT = 0.1  # a row during which the hypervisor took more than this share of the CPU time is marked
MARK = "†"
DOES_NOT_FIT, NOT_INSTALLED = "does not fit", "not installed"
OUT_OF_MEMORY = ("memoryerror", "out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
PROC = Path("/proc")


def cpu_times() -> tuple[int, int]:
    """Stolen and total CPU ticks since boot; zeros where the system does not tell."""
    try:
        fields = [int(word) for word in (PROC / "stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return 0, 0
    return fields[7], sum(fields)


def steal_since(before: tuple[int, int]) -> float:
    """Share of all CPU time since `before` that the hypervisor gave to others."""
    after = cpu_times()
    total = after[1] - before[1]
    return (after[0] - before[0]) / total if total else 0.0


def _from_proc(file: str, name: str) -> int | None:
    """Bytes of a line such as `VmRSS:  1234 kB`; None where the system does not tell."""
    try:
        lines = (PROC / file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def wait(device: str) -> None:
    """Until an accelerator has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def available_memory() -> int | None:
    return _from_proc("meminfo", "MemAvailable")


def extra_memory(step: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes at the peak of a call beyond those before it; None where the system does not tell.

    A child starts with an allocator that returns freed blocks to the system at once; glibc otherwise keeps
    those of up to 32 MB, and the peak would tell how it packs them instead of how much is needed at a time.
    That costs time: call `keep_freed_memory` before taking any.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # what earlier calls freed would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
    if device == "cuda":
        import torch

        wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        wait(device)
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # the peak starts anew; where it cannot, it is that of all calls so far
        (PROC / "self/clear_refs").write_text("5")
    resident = _from_proc("self/status", "VmRSS")
    step()
    peak = _from_proc("self/status", "VmHWM")
    if peak is None and resident is not None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return None if peak is None or resident is None else peak - resident


def keep_freed_memory() -> None:
    """What glibc does of itself after a few calls, and children only from here on."""
    with suppress(OSError, AttributeError):  # another C library does as it does
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def limit_memory(extra: int) -> None:
    """Refuse this process more than so many bytes beyond what it has, before the system runs out of them."""
    import resource

    have = _from_proc("self/status", "VmData")
    if have is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (have + extra, hard))


def describe(*packages: str) -> str:
    """Processor, cores, memory, system and versions, in a line."""
    try:
        lines = (PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    total = _from_proc("meminfo", "MemTotal")
    facts = [model or platform.machine(), f"{os.cpu_count()} cores"]
    facts += [f"{total / 1e9:.0f} GB"] if total else []
    facts.append(f"{platform.system()} {platform.release().split('-')[0]}")
    facts.append(f"Python {platform.python_version()}")
    for package in packages:
        try:
            facts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            facts.append(f"no {package}")
    return ", ".join(facts)


def launch(script: str, case: Mapping[str, Any]) -> "subprocess.Popen[str]":
    """The same script once more, with one case to run in so many threads; it ends with its result as JSON."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # see `extra_memory`
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(case["threads"]))
    command = [sys.executable, "-W", "ignore", script, "--child", json.dumps(case)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What a child printed, or {"problem": why it did not}."""
    stdout, stderr = process.communicate()
    code, words = process.returncode, stderr.lower()
    if code == 0:
        return json.loads(stdout.splitlines()[-1])
    if code in (-9, 137) or any(sign in words for sign in OUT_OF_MEMORY):
        return {"problem": DOES_NOT_FIT}
    if "modulenotfounderror" in words:
        return {"problem": NOT_INSTALLED}
    return {"problem": f"failed: {(stderr.strip().splitlines() or [f'exit code {code}'])[-1]}"}


def relative_error(found: "Tensor", exact: "Tensor") -> float:
    """Largest difference, relative to the largest value."""
    return float((found.detach().double() - exact).abs().max() / exact.abs().max())


def alternate(
    names: Iterable[str], rounds: int, start: Callable[[str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The runs of each name: in a round every one runs once; one with a problem is not tried again."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, before in runs.items():
            if not before or "problem" not in before[-1]:
                before.append(start(name))
    return runs


def medians(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Medians over the runs with little steal, or over all of them, and then `mark` is set."""
    if "problem" in runs[-1]:
        return {"problem": runs[-1]["problem"]}
    calm = [run for run in runs if run["steal"] <= STEAL_LIMIT]
    kept = calm or runs
    values = {key: [run[key] for run in kept if run[key] is not None] for key in (*keys, "steal")}
    middle = {key: median(found) if found else None for key, found in values.items()}
    return {**middle, "mark": "" if calm else MARK}


def compare(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str], ours: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Medians of each name, and under "KEY ÷ ours" how many times those of `ours[name]` they are."""
    found = {name: medians(of, keys) for name, of in runs.items()}
    for name, row in found.items():
        own = found.get(ours[name], {})
        row.update({f"{key} ÷ ours": ratio(row.get(key), own.get(key)) for key in keys})
    return found


def number(x: float | None, unit: str = "") -> str:
    """Three significant digits without an exponent, from 0.001 on; a dash for what is not known."""
    if x is None or not math.isfinite(x):
        return "–"
    if x == 0:
        return f"0{unit}"
    size = math.floor(math.log10(abs(x)))
    return f"{x:.1e}{unit}" if size < -3 else f"{x:.{max(0, 2 - size)}f}{unit}"


def ratio(x: float | None, to: float | None) -> float | None:
    return x / to if x is not None and to else None


class Table:
    """A Markdown table, printed row by row so that a long run can be followed."""

    def __init__(self, *columns: str) -> None:
        self.columns = columns
        print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)

    def add(self, *values: object) -> None:
        cells = [*map(str, values), *[""] * (len(self.columns) - len(values))]
        print("| " + " | ".join(cells) + " |", flush=True)


def save_json(path: Path | None, **found: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class Line:
    """One line of a plot with its points (x, y); two lines of one colour differ in being dashed."""

    label: str
    colour: int
    dashed: bool
    points: list[tuple[float, float]] = field(default_factory=list)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by all eyes


def plot(path: Path, x_label: str, panels: Mapping[str, Sequence[Line]]) -> None:
    """Log–log panels side by side, one line for each method, as an SVG that is the same every time."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "clipkit", "svg.fonttype": "none", "font.size": 9})
    mpl.rcParams["font.sans-serif"] = ["DejaVu Sans"]  # the list is written at each text: keep it short
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    size = (4.6 * len(panels), 4.4)
    figure, grid = plt.subplots(1, len(panels), figsize=size, facecolor="white", squeeze=False)
    ticks = sorted({x for lines in panels.values() for line in lines for x, _ in line.points})
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for line in lines:
            style, colour = "--" if line.dashed else "-", COLOURS[line.colour % len(COLOURS)]
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, style, color=colour, marker="o", markersize=3, label=line.label)
        axes.set(xscale="log", yscale="log", xlabel=x_label, title=title)
        labels = [f"{x // 1024:g}k" if x % 1024 == 0 else f"{x:g}" for x in ticks]
        axes.set_xticks(ticks, labels, rotation=45)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(color="#dddddd", linewidth=0.6)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.02 + 0.04 * math.ceil(len(names) / 3), 1, 1))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    path.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", drawn.getvalue()))  # a hundredth of a point is enough


if __name__ == "__main__":
    print(describe("torch", "open_clip_torch", "lightly", "pytorch-metric-learning", "matplotlib"))
