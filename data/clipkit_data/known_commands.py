"""The commands below `clipkit shards` that make shards of known data: `emoji`, `glyphs`, `digits`, `import`.

The work is imported when a command runs.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, progress
from clipkit_data.shard_commands import json_option, report

_SPLIT = "the folder to make: train/ and heldout/ below it"


def _split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help=_SPLIT)
    json_option(parser)


def _emoji(args: argparse.Namespace) -> int:
    from clipkit_data.tools.emoji import write_emoji_shards

    with progress("rendering") as bar:
        result = write_emoji_shards(Path(args.out), progress=bar.advance)
    sys.stderr.write(f"{args.out}: {result['pictures']} pictures, {result['heldout']} of them held out\n")
    if args.json:
        print_json(result)
    return 0


def _glyphs(args: argparse.Namespace) -> int:
    from clipkit_data.tools.glyphs import write_glyph_shards

    with progress("rendering") as bar:
        result = write_glyph_shards(Path(args.out), progress=bar.advance)
    words = f"{result['classes']} characters in {result['faces']} faces"
    sys.stderr.write(
        f"{args.out}: {result['pictures']} pictures, {result['heldout']} of them held out; {words}\n"
    )
    if args.json:
        print_json(result)
    return 0


def _digits(args: argparse.Namespace) -> int:
    from clipkit_data.tools.digits import write_digit_shards

    with progress("writing") as bar:
        result = write_digit_shards(Path(args.out), progress=bar.advance)
    report(f"{args.out}: {_counted(result['samples'])}", result["faults"])
    if args.json:
        print_json(result)
    return 0


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        metavar="KIND",
        help="cifar10, cifar100, stl10, imagenet (any folder of class folders), or tu: graphs",
    )
    parser.add_argument("source", help="the folder that the data set's archive unpacks to")
    parser.add_argument("out", help="the folder to make: one folder of shards per split below it")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, metavar="N", help="samples per shard (default: 10000)"
    )
    parser.add_argument("--attributes", action="store_true", help="tu: also take the nodes' attributes")
    json_option(parser)


def _import_tu(args: argparse.Namespace) -> int:
    from clipkit_data.tools.tu_graphs import import_tu

    with progress("writing graphs") as bar:
        result = import_tu(
            Path(args.source), Path(args.out), attributes=args.attributes, progress=bar.advance
        )
    words = f"{result['graphs']} graphs of {result['name']}, labels {', '.join(result['labels'])}, "
    words += f"{result['features'] or 'no'} features of each node"
    sys.stderr.write(f"{args.out}: {words}\n")
    if args.json:
        print_json(result)
    return 0


def _import(args: argparse.Namespace) -> int:
    if args.kind == "tu":
        return _import_tu(args)
    from clipkit_data.tools.importers import import_dataset
    from clipkit_data.tools.pack import FAULTS

    with progress("importing") as bar:
        result = import_dataset(
            args.kind, Path(args.source), Path(args.out), per_shard=args.per_shard, progress=bar.advance
        )
    listed = str(Path(args.out) / FAULTS)
    report(f"{args.out}: {_counted(result['samples'])}", result["faults"], listed)
    if args.json:
        print_json(result)
    return 0


def _counted(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{count} samples in {split}" for split, count in samples.items())


KNOWN = {
    "emoji": Command(
        help="render the emoji sample shards (needs fonts-noto-color-emoji and unicode-cldr-core)",
        examples="  clipkit shards emoji emoji-shards/",
        arguments=_split_arguments,
        run=_emoji,
    ),
    "glyphs": Command(
        help="render the glyph sample shards: letters in many faces (needs Debian's font packages)",
        examples="  clipkit shards glyphs glyph-shards/",
        arguments=_split_arguments,
        run=_glyphs,
    ),
    "digits": Command(
        help="write scikit-learn's 1797 scanned digits as shards",
        examples="  clipkit shards digits digit-shards/",
        arguments=_split_arguments,
        run=_digits,
    ),
    "import": Command(
        help="make shards of CIFAR-10, CIFAR-100, STL-10, class folders as ImageNet has them, or TU graphs",
        examples=(
            "  clipkit shards import cifar10 cifar-10-batches-py/ cifar10/\n"
            "  clipkit shards import stl10 stl10_binary/ stl10/\n"
            "  clipkit shards import imagenet ILSVRC/Data/CLS-LOC/ imagenet/ --per-shard 5000\n"
            "  clipkit shards import tu NCI1/ nci1/"
        ),
        arguments=_import_arguments,
        run=_import,
    ),
}
