"""Self-supervised training: accuracy, speed and memory, clipkit beside lightly's building blocks.

    python benchmarks/methods.py --plot methods.svg          # half an hour on two cores
    python benchmarks/methods.py --quick                     # two minutes

SimCLR, MoCo v2, BYOL and SimSiam on the characters that ship with clipkit, and on scikit-learn's digits. Both
sides have the same pictures, backbone with the same initial weights, heads, augmentation, optimizer, learning
rates and number of steps; clipkit runs its own loop on shards, lightly's blocks run in the loop that its
examples have (methods_lightly.py). In a round both run once in turn, each in a process of its own, with all
cores for the arithmetic, in bfloat16 where the processor multiplies in it (losses in float32), and no loader
processes. A seed is a round. Ratios are clipkit's figure divided by
lightly's for speed, and lightly's by clipkit's for memory. Accuracy is measured on held-out samples by the
same code for both, on the backbone's features. Rows with more than 10 % of stolen CPU time are marked †.

`lightly` is in clipkit's group of development packages, so both sides share one environment.
"""

import argparse
import json
import logging
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import machine
from machine import number

SIDES = ("clipkit", "lightly")
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": 0.2, "hidden": 128, "dim": 128},
    "moco_v2": {"temperature": 0.2, "hidden": 128, "dim": 128, "queue": 1024, "momentum": 0.99},
    "byol": {"momentum": 0.97, "hidden": 256, "dim": 128},
    "simsiam": {"hidden": 256, "dim": 256},
}
CHANGES = {
    "area": (0.3, 1.0), "aspect": (3 / 4, 4 / 3), "jitter_p": 0.8,
    "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2,
}  # fmt: skip
TOWER = {"name": "cnn", "widths": [32, 64, 128], "depths": [1, 1, 1], "stem": 2, "norm": "batch"}
OPTIM = {"lr": 0.002, "weight_decay": 0.01, "beta2": 0.999, "eps": 1e-8, "warmup_steps": 10}
PLAIN = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize": "squash"}
_STEPS_FOR_MEMORY = 10
FIGURES = ("samples/s", "samples/CPU s", "memory", "knn", "linear")


def recipe_of(case: dict[str, Any]) -> Any:
    """The run as a recipe; lightly's side takes data, backbone and optimizer from it too."""
    from clipkit.config import validate
    from clipkit_training.recipe import Recipe

    step = {"name": case["method"], **METHODS[case["method"]]}
    if case["method"] == "simsiam":
        step["layers"] = 3
    view = {"augment": CHANGES, "size": case["size"], "count": 2}
    data = {"train": f"sample:{case['data']}/train", "heldout": f"sample:{case['data']}/heldout"}
    data |= {"label": "label", "batch_size": case["batch"], "workers": case["workers"], "cache": True}
    data |= {"views": {"views": [view]}, "augment_on": "device"}
    model = {"modality": "image", "tower": TOWER, "preprocess": {"size": case["size"], **PLAIN}}
    fields = {"step": step, "max_steps": case["steps"], "seed": case["seed"], "model": model, "data": data}
    run = {"evaluations": 0, "checkpoints": 0, "optim": {**OPTIM, "clip_norm": None}}
    return validate(Recipe, {**fields, **run}, "case")


def train_clipkit(recipe: Any, case: dict[str, Any]) -> Any:
    from clipkit.models import load_encoder
    from clipkit_training.run import train_recipe
    from clipkit_training.world import world_from_environment

    with tempfile.TemporaryDirectory() as folder, world_from_environment("cpu") as world:
        result = train_recipe(recipe, Path(folder) / "run", world)
        return load_encoder(result["model"])


def train_lightly(recipe: Any, case: dict[str, Any]) -> Any:
    import methods_lightly
    import torch
    from PIL import Image

    from clipkit.models import build_model
    from clipkit_data.batches.pairs import load_pairs
    from clipkit_data.sources import open_dataset
    from clipkit_training.optim import build_optimizer, learning_rate
    from clipkit_training.precision import resolve_precision

    encoder = build_model(recipe.model, seed=case["seed"])
    found = load_pairs(open_dataset(recipe.data.train), encoder.preprocess, captions=False)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in found.images]
    methods_lightly.train(
        encoder.tower,
        encoder.dim,
        pictures,
        {**case, **METHODS[case["method"]], "changes": CHANGES},
        partial(build_optimizer, config=recipe.optim),
        lambda step: learning_rate(
            recipe.optim, step, step / case["steps"], recipe.optim.warmup_steps / case["steps"]
        ),
        resolve_precision(recipe.precision, torch.device("cpu")) == "bf16",
    )
    return encoder.eval()


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train once and judge. Time is of the training alone, imports done; memory of a short one."""
    train = {"clipkit": train_clipkit, "lightly": train_lightly}[case["side"]]

    def train_for(steps: int) -> Any:
        short = {**case, "steps": steps}
        return train(recipe_of(short), short)

    train_for(2)  # imports, first calls
    memory = machine.extra_memory(lambda: train_for(_STEPS_FOR_MEMORY))
    machine.keep_freed_memory()
    before, cpu, start = machine.cpu_times(), time.process_time(), time.perf_counter()
    encoder = train_for(case["steps"])
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    samples, steal = case["steps"] * case["batch"], machine.steal_since(before)
    figures = {"samples/s": samples / wall, "samples/CPU s": samples / cpu, "memory": memory, "steal": steal}
    return {**figures, **judge(encoder, recipe_of(case), case["baselines"])}


def judge(encoder: Any, recipe: Any, baselines: bool) -> dict[str, Any]:
    """kNN (k = 20) and a linear probe on held-out samples."""
    from clipkit.metrics import knn_accuracy
    from clipkit_data.batches.pairs import EvalBatches
    from clipkit_data.sources import open_dataset
    from clipkit_training.judge.features import encoded, read_features, untrained
    from clipkit_training.judge.labels import code_labels
    from clipkit_training.judge.linear import logistic_probe
    from clipkit_training.judge.raw import raw

    of = {"": encoded(encoder)}
    if baselines:
        of |= {"untrained": encoded(untrained(encoder, recipe.seed)), "raw": raw(encoder)}
    known, held = (
        read_features(EvalBatches(open_dataset(spec), encoder.preprocess, captions=False), of, "label")
        for spec in (recipe.data.train, recipe.data.heldout)
    )
    found: dict[str, Any] = {}
    for kind in of:
        train, test = known[kind], held[kind]
        coded, mean_D = code_labels(train.labels, test.labels), train.x_ND.mean(dim=0) * (kind == "raw")
        votes = knn_accuracy(
            test.x_ND - mean_D, coded.heldout_N, train.x_ND - mean_D, coded.train_N, ks=(20,)
        )
        figures = {"knn": votes["knn@20"], "linear": logistic_probe(train, test)["top1"]}
        found |= {kind: figures} if kind else figures
    return found


def child(case: dict[str, Any]) -> None:
    logging.disable(logging.WARNING)
    print(json.dumps(run(case)), flush=True)


def start(case: dict[str, Any], side: str, seed: int, threads: int) -> dict[str, Any]:
    return machine.finish(machine.launch(__file__, {**case, "side": side, "seed": seed, "threads": threads}))


def spread(runs: list[dict[str, Any]], key: str) -> str:
    values = [100 * run[key] for run in runs]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def compare(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The table, printed as it grows; its rows, and every run behind them."""
    titles = ["samples/s", "÷ lightly", "÷ lightly, per CPU s", "peak MB", "lightly's ÷", "kNN %", "linear %"]
    table = machine.Table("data", "method", "side", *titles, "steal")
    rows, every = list[Any](), list[Any]()
    for data in args.data:
        for method in args.methods:
            case = {"data": data, "method": method, "steps": args.steps, "batch": args.batch}
            case |= {"size": 32, "workers": args.workers, "baselines": False}
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for seed in range(args.seeds):
                for side in SIDES:
                    case["baselines"] = side == "clipkit" and seed == 0 and method == args.methods[0]
                    runs[side].append(start(case, side, seed, args.threads))
            every += [
                {"data": data, "method": method, "side": side, **run} for side in SIDES for run in runs[side]
            ]
            medians = {side: machine.medians(runs[side], FIGURES) for side in SIDES}
            for side, row in medians.items():
                rows.append({"data": data, "method": method, "side": side, **row})
                if "problem" in row:
                    table.add(data, method, side, row["problem"])
                    continue
                cells = [number(row["samples/s"])]
                other = medians["lightly"]
                cells += [
                    number(machine.ratio(row[key], other.get(key))) for key in ("samples/s", "samples/CPU s")
                ]
                memory = machine.ratio(other.get("memory"), row["memory"])
                cells += [number(machine.ratio(row["memory"], 1e6)), number(memory)]
                cells += [spread(runs[side], key) for key in ("knn", "linear")]
                table.add(data, method, side, *cells, number(100 * row["steal"], " %") + row["mark"])
        for kind in ("untrained", "raw"):
            found = [run[kind] for run in every if run["data"] == data and kind in run]
            if found:
                table.add(data, kind, "", "", "", "", "", "", spread(found, "knn"), spread(found, "linear"))
    return rows, every


def draw(path: Path, every: list[dict[str, Any]]) -> None:
    """Accuracy of each run against its speed: a panel for each set of pictures."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "clipkit", "svg.fonttype": "none", "font.size": 9})
    mpl.rcParams["font.sans-serif"] = ["DejaVu Sans"]
    from matplotlib import pyplot as plt

    every = [run for run in every if "problem" not in run]
    sets = list(dict.fromkeys(run["data"] for run in every))
    methods = list(dict.fromkeys(run["method"] for run in every))
    figure, grid = plt.subplots(
        1, len(sets), figsize=(4.6 * len(sets), 3.6), facecolor="white", squeeze=False
    )
    for axes, data in zip(grid[0], sets, strict=True):
        for side, marker in zip(SIDES, "ox", strict=True):
            for colour, method in zip(machine.COLOURS, methods, strict=False):
                here = [
                    run for run in every if (run["data"], run["method"], run["side"]) == (data, method, side)
                ]
                x, y = [run["samples/s"] for run in here], [100 * run["linear"] for run in here]
                axes.scatter(x, y, color=colour, marker=marker, label=f"{method}, {side}")
        axes.set(title=data, xlabel="samples per second", ylabel="linear accuracy, %", xlim=(0, None))
        axes.grid(color="#dddddd", linewidth=0.6)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    import os

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data", nargs="+", choices=("glyphs", "digits"), default=["glyphs", "digits"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="loader processes, of both sides")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    parser.add_argument("--json", type=Path, help="write every run here")
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps, args.data = 1, 20, ["glyphs"]
    return args


def main() -> None:
    args = parse()
    if args.child:
        child(json.loads(args.child))
        return
    host = machine.describe("torch", "torchvision", "lightly")
    print(host)
    rows, every = compare(args)
    machine.save_json(args.json, machine=host, rows=rows, runs=every)
    if args.plot:
        draw(args.plot, every)
    if any("problem" in row for row in rows if row["side"] == "clipkit"):
        raise SystemExit("methods.py: a case of clipkit failed, see the table")


if __name__ == "__main__":
    main()
