"""`clipkit study augmentations` and `clipkit study heads`: one recipe in many forms, the outcome drawn."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table, progress
from clipkit.errors import InputError

if TYPE_CHECKING:
    from clipkit_training.recipe import Recipe
    from clipkit_training.study import Cell

_FIGURES = ("linear", "knn", "loss", "embedding_std", "seconds")


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="what to train, with labelled data (default: SimCLR in small on sample:glyphs)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of each run (default: the recipe's, else 100)"
    )
    parser.add_argument("--seeds", default="0", metavar="S,S", help="seeds of the runs (default: 0)")
    parser.add_argument("--only", action="append", default=[], metavar="CELL", help="train this cell alone")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the study's folder, also of one to go on with (study-NAME)"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as one line of JSON")


def _augmentations_arguments(parser: argparse.ArgumentParser) -> None:
    _shared(parser)
    parser.add_argument(
        "--transforms",
        default="crop,rotate,colour,blur,flip",
        metavar="A,B",
        help="augmentations to pair; also shift, grey, solarize (default: crop,rotate,colour,blur,flip)",
    )


def _augmentations(args: argparse.Namespace) -> None:
    from clipkit_training.study import augmentation_cells

    base, names = _base(args), _words(args.transforms, "--transforms")
    cells = augmentation_cells(names, base.model.preprocess.size)
    report = _run(args, base, cells, "augmentations")
    values = _places(report)
    report["pictures"] = _draw_pairs(report, values, names)
    if args.json:
        print_json(report)
        return
    rows = [
        [row, *(_percent(values.get((row, column))) for column in names), _row_mean(values, row, names)]
        for row in names
    ]
    print_table(rows, ["linear, %", *names, "average"])
    _print(report)


def _draw_pairs(report: dict[str, Any], values: dict[tuple[str, str], float], names: list[str]) -> list[str]:
    from clipkit_training.study_plots import heat_map

    title = f"linear accuracy after {_named(report)}, untrained {_percent(report['untrained']['linear'])} %"
    return [str(file) for file in heat_map(values, names, title, Path(report["out"]) / "augmentations")]


def _heads_arguments(parser: argparse.ArgumentParser) -> None:
    _shared(parser)
    parser.add_argument(
        "--heads",
        default="none,linear,v1",
        metavar="A,B",
        help="the step's heads; v1 has one hidden layer (default: none,linear,v1)",
    )
    parser.add_argument(
        "--dims", default="16,32,64,128", metavar="D,D", help="widths of their output (default: 16,32,64,128)"
    )


def _heads(args: argparse.Namespace) -> None:
    from clipkit_training.study import head_cells
    from clipkit_training.study_plots import bars

    heads, dims = _words(args.heads, "--heads"), _numbers(args.dims, "--dims", 1)
    report = _run(args, _base(args), head_cells(heads, dims), "heads")
    columns = [str(dim) for dim in dims] + [""] * ("none" in heads)
    title = f"linear accuracy of the features after {_named(report)}"
    pictures = bars(
        _places(report), heads, columns, report["untrained"]["linear"], title, Path(report["out"]) / "heads"
    )
    report["pictures"] = [str(file) for file in pictures]
    if args.json:
        print_json(report)
    else:
        _print(report)


def _base(args: argparse.Namespace) -> "Recipe":
    from clipkit_training.figures import new_figure
    from clipkit_training.recipe import load_recipe
    from clipkit_training.study import SMALL, base_of

    new_figure(1, 1)  # without matplotlib say so now, not after the training
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps is {args.steps}, not 1 or more")
    return base_of(load_recipe(args.recipe or str(SMALL), args.rest), args.steps)


def _run(args: argparse.Namespace, base: "Recipe", cells: "Sequence[Cell]", what: str) -> dict[str, Any]:
    """Train what is missing. Returns the report: each cell's figures, means over the seeds."""
    from clipkit_training.steps import step_name
    from clipkit_training.study import SMALL, UNTRAINED, averages, chosen, run_study

    seeds, out = _numbers(args.seeds, "--seeds", 0), args.out or Path(f"study-{what}")
    wanted = chosen(cells, args.only)
    with progress("studying", total=len(seeds) * (len(wanted) + 1)) as bar:

        def advance(name: str) -> None:
            bar.advance()
            bar.update(text=f"{name} is done")

        every = run_study(base, wanted, out, seeds=seeds, advance=advance)
    rows = [row for row in every if row["seed"] in seeds]
    means = {figure: averages(rows, figure) for figure in _FIGURES}
    figures = {
        cell.name: {"row": cell.row, "column": cell.column}
        | {figure: means[figure].get(cell.name) for figure in _FIGURES}
        for cell in cells
        if cell.name in means["linear"]
    }
    untrained = {figure: means[figure][UNTRAINED] for figure in ("linear", "knn")}
    return {
        "out": str(out),
        "recipe": args.recipe or SMALL.stem,
        "step": step_name(base.step),
        "seeds": seeds,
        "untrained": untrained,
        "cells": figures,
    }


def _places(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """The linear accuracy of each cell by (row, column); a pair stands at both of its places."""
    values = {(cell["row"], cell["column"]): cell["linear"] for cell in report["cells"].values()}
    return {(column, row): value for (row, column), value in values.items() if column} | values


def _named(report: dict[str, Any]) -> str:
    """What was trained, for people."""
    return f"{report['step']} on {Path(report['recipe']).stem}"


def _row_mean(values: dict[tuple[str, str], float], row: str, columns: Sequence[str]) -> str:
    found = [values[row, column] for column in columns if (row, column) in values]
    return _percent(sum(found) / len(found)) if found else ""


def _print(report: dict[str, Any]) -> None:
    rows = [
        [name, *("" if cell[figure] is None else round(cell[figure], 4) for figure in _FIGURES)]
        for name, cell in report["cells"].items()
    ]
    untrained = report["untrained"]
    rows.append(["untrained", untrained["linear"], untrained["knn"], "", "", ""])
    print_table(rows, ["cell", *_FIGURES])
    print_table([[file] for file in report["pictures"]], ["pictures"])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _words(text: str, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if "" in words or len(set(words)) < len(words):
        raise InputError(f"{option} {text!r}: a name is empty or there twice")
    return words


def _numbers(text: str, option: str, least: int) -> list[int]:
    words = _words(text, option)
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise InputError(f"{option} {text!r}: give whole numbers of {least} or more, with commas between")
    return [int(word) for word in words]


study = Command(
    help="train a recipe in many forms and compare: pairs of augmentations, projection heads",
    examples=(
        "  clipkit study augmentations --steps 200\n"
        "  clipkit study heads --heads linear,v1 --dims 32,128 --seeds 0,1,2 --json"
    ),
    subcommands={
        "augmentations": Command(
            help="every augmentation alone and in pairs, judged by linear accuracy (SimCLR's figure 5)",
            examples=(
                "  clipkit study augmentations\n"
                "  clipkit study augmentations --transforms crop,colour --steps 100 --out study\n"
                "  clipkit study augmentations --only crop+colour --only crop --data.batch-size 256"
            ),
            arguments=_augmentations_arguments,
            run=_augmentations,
            passthrough=True,
        ),
        "heads": Command(
            help="projection heads of several kinds and widths (SimCLR's figure 8)",
            examples="  clipkit study heads\n  clipkit study heads --dims 32,128 --seeds 0,1 --json",
            arguments=_heads_arguments,
            run=_heads,
            passthrough=True,
        ),
    },
)
