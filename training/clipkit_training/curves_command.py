"""`clipkit curves`: how runs went, drawn side by side."""

import argparse
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table
from clipkit.errors import InputError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--figure",
        action="append",
        default=[],
        metavar="NAME",
        help="what to draw, also twice (default: held-out neighbours or recall, RankMe, and the loss)",
    )
    parser.add_argument(
        "--over", default="steps", metavar="X", help="what is to the right: steps, samples or seconds (steps)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves"),
        metavar="NAME",
        help="writes NAME.png and NAME.svg (curves)",
    )
    parser.add_argument("--json", action="store_true", help="print the points as one line of JSON")


def _run(args: argparse.Namespace) -> None:
    from clipkit_training.curves import draw_curves, read_curves

    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):  # such as a/run and b/run
        names = [str(run) for run in args.runs]
    if len(set(names)) < len(names):
        raise InputError("a run is named twice")
    runs = {name: read_curves(run, args.over) for name, run in zip(names, args.runs, strict=True)}
    out = args.out.with_suffix("") if args.out.suffix in (".png", ".svg") else args.out
    files = [str(file) for file in draw_curves(runs, args.figure, args.over, out)]
    if args.json:
        print_json({"over": args.over, "runs": runs, "pictures": files})
    else:
        print_table([[file] for file in files], ["pictures"])


curves = Command(
    help="draw how runs went, one or several: loss, held-out accuracy and any other figure of their logs",
    examples="""  clipkit curves runs/simclr
  clipkit curves runs/simclr runs/byol --over seconds --out compared
  clipkit curves runs/mine --figure loss --figure grad_norm --json""",
    arguments=_arguments,
    run=_run,
)
