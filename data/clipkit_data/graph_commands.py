"""The command `clipkit shards graphs`: graphs with known labels as shards."""

import argparse
import sys
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, progress
from clipkit_data.shard_commands import json_option


def _out_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="the folder to make: train/ and heldout/ below it")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: 0)")
    json_option(parser)


def _families_arguments(parser: argparse.ArgumentParser) -> None:
    _out_arguments(parser)
    for split, count in (("train", 150), ("heldout", 50)):
        words = f"graphs of each family in {split} (default: {count})"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=words)


def _families(args: argparse.Namespace) -> int:
    from clipkit_data.tools.graphs import write_families

    with progress("drawing graphs") as bar:
        result = write_families(
            Path(args.out), train=args.train, heldout=args.heldout, seed=args.seed, progress=bar.advance
        )
    families = ", ".join(result["families"])
    words = f"{result['train']} graphs to train on, {result['heldout']} held out; families: {families}"
    sys.stderr.write(f"{args.out}: {words}\n")
    if args.json:
        print_json(result)
    return 0


def _atlas(args: argparse.Namespace) -> int:
    from clipkit_data.tools.graphs import write_atlas

    with progress("writing graphs") as bar:
        result = write_atlas(Path(args.out), seed=args.seed, progress=bar.advance)
    sys.stderr.write(f"{args.out}: {result['train']} graphs to train on, {result['heldout']} held out\n")
    if args.json:
        print_json(result)
    return 0


GRAPHS = Command(
    help="make shards of graphs with known labels (needs clipkit[graph])",
    examples="  clipkit shards graphs families families/\n  clipkit shards graphs atlas atlas/",
    subcommands={
        "families": Command(
            help="random graphs of eight families that differ in neither size nor density",
            examples="  clipkit shards graphs families families/",
            arguments=_families_arguments,
            run=_families,
        ),
        "atlas": Command(
            help="all graphs of one to seven nodes, with properties to probe for",
            examples="  clipkit shards graphs atlas atlas/",
            arguments=_out_arguments,
            run=_atlas,
        ),
    },
)
