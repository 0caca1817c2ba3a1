"""Loading shards: samples per second and per CPU second, clipkit beside its peers.

    python benchmarks/loader.py --install                 # virtual environments for the peers, once
    python benchmarks/loader.py --plot loader.svg         # some ten minutes on two cores
    python benchmarks/loader.py --quick                   # a minute
    python benchmarks/loader.py --startup                 # first batch, resume, memory of the order

From shards on a local disk (in the page cache) to batches of 224 px pictures and token ids. The peers are
open_clip's own training pipeline, plain webdataset with Pillow and torchvision, Megatron-Energon,
mosaicml-streaming and Hugging Face datasets; see loader_peers/pipelines.py. In a round every method runs once
in turn, in a process of its own, all with the same number of workers and one thread in each process. Figures
are medians over the rounds, ratios are the peer's figure divided by clipkit's. `steal` is the share of CPU
time that the hypervisor took away: runs above 10 % are left out of the medians, and where there are no others
the row is marked †. Batches of 1600 × 1200 pictures hold a quarter as many, so that a run stays short.

Some peers pin other versions of packages than clipkit. So each has a virtual environment of its own, which
holds what differs and finds all the rest (torch above all) in the environment that runs this script.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import traceback
import venv
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import machine
from loader_peers import measure
from loader_peers.pipelines import PIPELINES
from machine import number, ratio

PEERS = {
    "open_clip": "open_clip_torch[training]",
    "energon": "megatron-energon",
    "streaming": "mosaicml-streaming",
    "datasets": "datasets",
}
WITH_CENTRE = ("clipkit", "open_clip")
STARTUP = ("clipkit", "clipkit, no index", "open_clip", "webdataset")
DIVIDED = {"640x480": 1, "1600x1200": 4}  # the batch is, so that a run of large pictures stays short
KEYS = ("samples/s", "samples/CPU s")
LIMIT = 240  # seconds, of a case
Rows = list[dict[str, Any]]


def environment(folder: Path, method: str) -> Path:
    """The interpreter that runs a method."""
    return folder / f"venv-{method}" / "bin" / "python" if method in PEERS else Path(sys.executable)


def install(folder: Path, methods: list[str]) -> None:
    """A virtual environment for each peer that needs one."""
    base = sysconfig.get_path("purelib")
    for method in (method for method in methods if method in PEERS):
        home = folder / f"venv-{method}"
        print(f"{home}: {PEERS[method]}", flush=True)
        venv.create(home, clear=True, symlinks=True, with_pip=True)
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "zz_base.pth").write_text(f"import site; site.addsitedir({base!r})\n")
        command = [environment(folder, method), "-m", "pip", "install", "--quiet", PEERS[method]]
        if subprocess.run(command, check=False).returncode:
            print(f"{method}: not installed, see above", flush=True)


def start(args: argparse.Namespace, job: str, method: str, **rest: Any) -> dict[str, Any]:
    """Run one case in a process of its own, with the interpreter of its method."""
    python = environment(args.folder, method)
    if not python.exists():
        return {"problem": f"{machine.NOT_INSTALLED}: see --install"}
    case = {"job": job, "method": method, "root": str(args.folder), "limit": LIMIT, **rest}
    command = [str(python), "-W", "ignore", __file__, "--child", json.dumps(case)]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(args.folder / "huggingface")}
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=pipe, stderr=pipe, text=True, errors="replace"
    )
    return machine.finish(process)


def child(case: dict[str, Any]) -> None:
    """Run a case, print what it found, and leave nothing running."""
    try:
        print(json.dumps(measure.run(case)), flush=True)
    except Exception:
        traceback.print_exc()
        measure.leave(1)
    measure.leave(0)


def prepare(args: argparse.Namespace) -> None:
    """The sets of samples; peers make their own formats of them in their first run, before it is timed."""
    for size in args.sizes:
        found = start(args, "prepare", "clipkit", size=size, pictures=args.pictures // DIVIDED[size])
        if "problem" in found:
            raise SystemExit(f"loader.py: no samples of {size}, {found['problem']}")
        mean = number(found["bytes"] / found["samples"] / 1e3)
        print(f"{size}: {found['samples']} samples of {mean} kB on average", flush=True)


def speeds(args: argparse.Namespace) -> tuple[Rows, Rows]:
    """A table of medians, printed as it grows; its rows, and every run behind them."""
    titles = ["samples/s", "÷ clipkit", "samples per CPU s", "÷ clipkit", "CPU ms per sample", "steal"]
    table = machine.Table("pictures", "crop", "workers", "method", *titles)
    rows, every = list[Any](), list[Any]()
    for size, geometry, workers in product(args.sizes, args.geometry, args.workers):
        at = {"size": size, "geometry": geometry, "workers": workers}
        case = {**at, "batch": args.batch // DIVIDED[size], "pictures": args.pictures // DIVIDED[size]}
        methods = [name for name in args.methods if geometry == "crop" or name in WITH_CENTRE]
        run = partial(start, args, "speed", seconds=args.seconds, **case)
        runs = machine.alternate(methods, args.rounds, run)
        every += [{**at, "method": name, **run} for name in runs for run in runs[name]]
        for name, row in machine.compare(runs, KEYS, dict.fromkeys(methods, "clipkit")).items():
            rows.append({**at, "method": name, **row})
            if "problem" in row:
                table.add(size, geometry, workers, name, row["problem"])
                continue
            cells = [number(row[key]) for key in ("samples/s", "samples/s ÷ ours")]
            cells += [number(row[key]) for key in ("samples/CPU s", "samples/CPU s ÷ ours")]
            cells += [number(1e3 / row["samples/CPU s"]), number(100 * row["steal"], " %") + row["mark"]]
            table.add(size, geometry, workers, name, *cells)
    return rows, every


def pixels(args: argparse.Namespace) -> Rows:
    """How far clipkit's pixels for evaluation are from open_clip's."""
    titles = ["largest difference, levels", "values that differ", "by more than 1 level"]
    table = machine.Table("pictures", "compared", *titles)
    rows = list[Any]()
    for size in args.sizes:
        found = start(args, "pixels", "clipkit", size=size, pictures=args.pictures // DIVIDED[size])
        rows.append({"size": size, **found})
        if "problem" in found:
            table.add(size, found["problem"])
        else:
            share = number(100 * found["share"], " %")
            table.add(size, found["pictures"], found["largest"], share, found["beyond one"])
    return rows


def startups(args: argparse.Namespace) -> Rows:
    """Seconds to the first batch of many shards."""
    table = machine.Table(
        "shards", "method", "s to the first batch", "s to resume at 90 % of an epoch", "steal"
    )
    start(args, "prepare", "clipkit", shards=args.shards)
    methods = [name for name in STARTUP if name.split(",")[0] in args.methods]
    run = partial(start, args, "startup", shards=args.shards, batch=args.batch)
    rows = list[Any]()
    for name, found in machine.alternate(methods, args.rounds, run).items():
        row = machine.medians(found, ("first", "resume"))
        rows.append({"method": name, "shards": args.shards, "runs": found, **row})
        if "problem" in row:
            table.add(args.shards, name, row["problem"])
            continue
        steal = number(100 * row["steal"], " %") + row["mark"]
        table.add(args.shards, name, number(row["first"]), number(row["resume"]), steal)
    return rows


def order(args: argparse.Namespace) -> dict[str, Any]:
    """Memory of the order of 2 · 10⁹ samples."""
    table = machine.Table("samples of the order", "extra MB", "s to the first batch", "s to the next")
    found = start(args, "order", "clipkit")
    if "problem" in found:
        table.add(found["problem"])
    else:
        seconds = number(found["first"]), number(found["next"])
        table.add(f"{found['samples']:,}", number(ratio(found["extra"], 1e6)), *seconds)
    return found


def draw(path: Path, rows: Rows) -> None:
    """Samples per CPU second as bars: a panel for each kind of picture and crop."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "clipkit", "svg.fonttype": "none", "font.size": 9})
    mpl.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.get("samples/CPU s")]
    names = list(dict.fromkeys((row["size"], row["geometry"], row["workers"]) for row in rows))
    size = (4.2 * len(names), 2.6)
    figure, grid = plt.subplots(1, len(names), figsize=size, facecolor="white", squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        here = [row for row in rows if (row["size"], row["geometry"], row["workers"]) == name][::-1]
        colours = [machine.COLOURS[0 if row["method"] == "clipkit" else 1] for row in here]
        bars = axes.barh(
            [row["method"] for row in here], [row["samples/CPU s"] for row in here], color=colours
        )
        axes.bar_label(bars, [number(row["samples/CPU s"]) for row in here], padding=2)
        axes.margins(x=0.15)
        axes.set(title=f"{name[0]}, {name[1]}, {name[2]} workers", xlabel="samples per CPU second")
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--sizes", nargs="+", choices=DIVIDED, default=list(DIVIDED))
    parser.add_argument("--geometry", nargs="+", choices=("crop", "centre"), default=["crop", "centre"])
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=256, help="different ones in a set")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="a run measures at least so long")
    parser.add_argument("--quick", action="store_true", help="small pictures, one short round")
    parser.add_argument("--startup", action="store_true", help="first batch, resume and order instead")
    parser.add_argument("--shards", type=int, default=1000, help="of --startup")
    parser.add_argument("--install", action="store_true", help="only make the peers' environments")
    default = Path(tempfile.gettempdir()) / "clipkit-loader"
    parser.add_argument("--folder", type=Path, default=default, help="of samples and environments")
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.geometry, args.batch, args.pictures = ["640x480"], ["crop"], 64, 64
        args.rounds, args.seconds = 1, 1.0
    return args


def main() -> None:
    args = parse()
    if args.child:
        child(json.loads(args.child))
    args.folder = args.folder.absolute()
    if args.install:
        install(args.folder, args.methods)
        return
    host = machine.describe("torch", "simplejpeg", "open_clip_torch", "webdataset", "pillow")
    print(host)
    if args.startup:
        rows, memory = startups(args), order(args)
        machine.save_json(args.json, machine=host, rows=rows, order=memory)
        ours = [*rows, memory]
    else:
        prepare(args)
        rows, runs = speeds(args)
        levels = pixels(args)
        machine.save_json(args.json, machine=host, rows=rows, pixels=levels, runs=runs)
        if args.plot:
            draw(args.plot, rows)
        ours = [*rows, *levels]
    if any("problem" in row for row in ours if row.get("method", "clipkit").startswith("clipkit")):
        raise SystemExit("loader.py: a case of clipkit failed, see the tables")


if __name__ == "__main__":
    main()
