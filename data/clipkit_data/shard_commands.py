"""The commands below `clipkit shards` that make shards or verify them, and what all of them share.

Those that look at shards or choose from them are in `clipkit_data.look_commands`, those that make shards of
known data sets in `clipkit_data.known_commands`. The work is imported when a command runs.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipkit.cli import Command
from clipkit.cli.output import counted, print_json, print_table, progress

SPEC = "a folder of shards, one .tar, a pattern, a URL or sample:NAME"
_FAULT = ("shard", "sample", "offset", "reason", "detail")


def json_option(parser: argparse.ArgumentParser, what: str = "the result") -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as one line of JSON")


def jobs_option(parser: argparse.ArgumentParser) -> None:
    """The option `--jobs`."""
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")


def out_options(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """The folder of shards to make, and how many samples a shard has."""
    words = "the folder of shards to make; after an interrupted run the same command goes on"
    parser.add_argument("out", help=words, nargs=None if needed else "?")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, metavar="N", help="samples per shard (default: 10000)"
    )


def report(words: str, faults: Mapping[str, int], listed: str = "", what: str = "left out") -> None:
    """Say on stderr what was done and what was left out."""
    lines = [words, *(f"  {what}: {reason} ×{count}" for reason, count in faults.items())]
    if faults and listed:
        lines.append(f"  each is listed in {listed}")
    sys.stderr.write("\n".join(lines) + "\n")


def print_faults(faults: Sequence[Mapping[str, Any]]) -> None:
    """The faults as a table, if there are any."""
    if faults:
        print_table(
            [["" if fault[name] is None else fault[name] for name in _FAULT] for fault in faults], _FAULT
        )


@contextmanager
def continuable(out: str) -> Iterator[None]:
    """Say what to do when the user interrupts the making of a folder."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"{out} is not finished: give the same command again to continue\n")
        raise


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="a folder of pictures, or a CSV, TSV, JSONL or Parquet file with columns path, caption"
    )
    out_options(parser)
    jobs_option(parser)
    json_option(parser)


def _pack(args: argparse.Namespace) -> int:
    from clipkit_data.tools.pack import FAULTS, pack

    with continuable(args.out), progress("packing") as bar:
        result = pack(args.source, args.out, per_shard=args.per_shard, jobs=args.jobs, progress=bar.advance)
    words = f"{args.out}: {counted(result['samples'], 'sample')} in {counted(result['shards'], 'shard')}"
    report(words, result["faults"], str(Path(args.out) / FAULTS))
    if args.json:
        print_json(result)
    return 0


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a folder of shards, one .tar or a pattern")
    parser.add_argument("--energon", action="store_true", help="also write Megatron-Energon's .tar.idx files")
    jobs_option(parser)
    json_option(parser)


def _index(args: argparse.Namespace) -> int:
    from clipkit_data.shards.energon import export_energon_index
    from clipkit_data.sources import resolve_shards
    from clipkit_data.tools.indexing import index_shards

    paths = resolve_shards(args.path)
    with progress("indexing", len(paths)) as bar:
        result = index_shards(args.path, jobs=args.jobs, progress=bar.advance)
    if args.json:
        print_json(result)
    else:
        print_faults(result["faults"])
    words = f"{counted(result['shards'], 'shard')}, {counted(result['samples'], 'readable sample')}"
    sys.stderr.write(
        f"{args.path}: {words}, {counted(len(result['faults']), 'fault')}; {result['manifest']}\n"
    )
    if args.energon:
        for path in paths:
            export_energon_index(Path(path))
    return 1 if result["faults"] else 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=SPEC)
    parser.add_argument(
        "--quick", action="store_true", help="only the tar files' structure; decode no picture"
    )
    jobs_option(parser)
    json_option(parser, "the faults")


def _check(args: argparse.Namespace) -> int:
    from clipkit_data.sources import resolve_shards
    from clipkit_data.tools.check import check_in_processes, check_manifests

    paths = resolve_shards(args.path)
    faults = check_manifests(paths)
    samples = 0
    with progress("checking", len(paths)) as bar:
        for found, readable in check_in_processes(paths, decode=not args.quick, jobs=args.jobs):
            faults += found
            samples += readable
            bar.advance()
    if args.json:
        print_json(faults)
    else:
        print_faults(faults)
    words = counted(len(paths), "shard"), counted(samples, "readable sample"), counted(len(faults), "fault")
    sys.stderr.write(f"{args.path}: {', '.join(words)}\n")
    return 1 if faults else 0


def _reshard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=SPEC)
    out_options(parser)
    parser.add_argument("--shuffle", action="store_true", help="in a random order instead of the present one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that order (default: 0)")
    jobs_option(parser)
    json_option(parser)


def _reshard(args: argparse.Namespace) -> int:
    from clipkit_data.tools.reshard import FAULTS, reshard

    with continuable(args.out), progress("copying") as bar:
        result = reshard(
            args.path,
            args.out,
            per_shard=args.per_shard,
            shuffle=args.shuffle,
            seed=args.seed,
            jobs=args.jobs,
            progress=bar.advance,
        )
    words = f"{args.out}: {counted(result['samples'], 'sample')} in {counted(result['shards'], 'shard')}"
    report(words, result["faults"], str(Path(args.out) / FAULTS), "fault of the source")
    if args.json:
        print_json(result)
    return 0


MAKING = {
    "pack": Command(
        help="make shards from your own pictures",
        examples=(
            "  clipkit shards pack photos/ shards/       # caption from photo.txt, else the file name\n"
            "  clipkit shards pack captions.csv shards/  # columns path, caption; others are kept"
        ),
        arguments=_pack_arguments,
        run=_pack,
    ),
    "index": Command(
        help="write index files and manifest.json: thousands of shards open at once, damage is noticed",
        examples="  clipkit shards index shards/\n  clipkit shards index shards/ --energon --jobs 8",
        arguments=_index_arguments,
        run=_index,
    ),
    "check": Command(
        help="verify shards; exit code 1 when there are faults",
        examples="  clipkit shards check shards/\n  clipkit shards check sample:emoji/heldout --json",
        arguments=_check_arguments,
        run=_check,
    ),
    "reshard": Command(
        help="copy samples into shards of another size or order",
        examples=(
            "  clipkit shards reshard shards/ larger/ --per-shard 20000\n"
            "  clipkit shards reshard 'shards/{00000..00009}.tar' mixed/ --shuffle --seed 1"
        ),
        arguments=_reshard_arguments,
        run=_reshard,
    ),
}
