"""The command `clipkit shards moving`: clips of emoji that move."""

import argparse
import sys
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, progress
from clipkit_data.shard_commands import json_option


def _moving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="the folder to make: train/, recombined/ and heldout/ below it")
    parser.add_argument("--emoji", type=int, default=300, metavar="N", help="to train on (default: 300)")
    parser.add_argument("--heldout", type=int, default=40, metavar="N", help="other emoji (default: 40)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of poses and choices (default: 0)")
    json_option(parser)


def _moving(args: argparse.Namespace) -> int:
    from clipkit_data.tools.moving import write_moving_shards

    with progress("drawing clips") as bar:
        chosen = {"seed": args.seed, "trained": args.emoji, "heldout": args.heldout}
        result = write_moving_shards(Path(args.out), **chosen, progress=bar.advance)
    words = ", ".join(f"{result[name]} {name}" for name in ("train", "recombined", "heldout"))
    sys.stderr.write(f"{args.out}: clips: {words}\n")
    if args.json:
        print_json(result)
    return 0


MOVING = Command(
    help="draw clips of emoji that move, from the emoji sample shards",
    examples="  clipkit shards moving clips/",
    arguments=_moving_arguments,
    run=_moving,
)
