"""The commands below `clipkit shards` that look at shards or choose from them: `stats`, `show`, `filter`.

The work is imported when a command runs.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from clipkit.cli import Command
from clipkit.cli.output import counted, print_json, print_table, progress
from clipkit_data.shard_commands import SPEC, continuable, jobs_option, json_option, out_options, report


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=SPEC)
    parser.add_argument("--plot", metavar="FILE", help="also draw histograms: a .png, .webp or .jpg file")
    jobs_option(parser)
    json_option(parser)


def _stats(args: argparse.Namespace) -> int:
    from clipkit_data.tools.plots import check_plot, histograms
    from clipkit_data.tools.stats import shard_statistics

    if args.plot:
        check_plot(args.plot)
    with progress("reading") as bar:
        found = shard_statistics(args.path, jobs=args.jobs, progress=bar.advance)
    if args.json:
        print_json(found.summary)
    else:
        _print_statistics(found.summary)
    if args.plot:  # what was counted is printed by now, whatever befalls the file
        words = f"{args.path}: {found.summary['samples']:,} samples"
        histograms(found.values, args.plot, title=words)
    return 0


def _print_statistics(summary: dict[str, Any]) -> None:
    simple = ("shards", "samples", "bytes", "empty_captions")
    counts = [[name.replace("_", " "), summary[name]] for name in simple]
    for name in ("duplicate_captions", "duplicate_pictures"):
        counts.append([name.replace("_", " "), summary[name]["samples"]])
    counts += [[f"format {name}", count] for name, count in summary["formats"].items()]
    counts += [[f"fault: {reason}", count] for reason, count in summary["faults"].items()]
    print_table([[name, f"{count:,}"] for name, count in counts], ("count", ""))
    known = {name: numbers for name, numbers in summary["per_sample"].items() if numbers}
    columns = list(next(iter(known.values()), {}))
    rows = [[name, *(f"{numbers[column]:,.4g}" for column in columns)] for name, numbers in known.items()]
    sys.stdout.write("\n")
    print_table(rows, ("per sample", *columns))
    for name in ("duplicate_captions", "duplicate_pictures"):
        for most in summary[name]["most_frequent"]:
            what, times = next(iter(most.values())), most["times"]
            sys.stdout.write(f"{name.replace('_', ' ').rstrip('s')}, {times} times: {what}\n")


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=SPEC)
    parser.add_argument("out", help="the sheet to write: .html, .png, .webp or .jpg")
    parser.add_argument("--count", type=int, default=48, metavar="N", help="samples shown (default: 48)")
    parser.add_argument("--random", action="store_true", help="draw them instead of taking the first")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: 0)")
    parser.add_argument("--keys", nargs="+", default=(), metavar="KEY", help="show these samples")
    parser.add_argument("--size", type=int, default=160, metavar="PX", help="longest side (default: 160)")
    parser.add_argument("--columns", type=int, default=8, metavar="N", help="pictures in a row (default: 8)")
    json_option(parser)


def _show(args: argparse.Namespace) -> int:
    from clipkit_data.dataset import ShardDataset
    from clipkit_data.sources import resolve_shards
    from clipkit_data.tools.sheet import choose, write_sheet

    dataset = ShardDataset(resolve_shards(args.path), name=args.path)
    positions = choose(dataset, args.count, random=args.random, seed=args.seed, keys=args.keys)
    write_sheet(dataset, positions, args.out, side=args.size, columns=args.columns)
    sys.stderr.write(f"{args.out}: {len(positions)} of {len(dataset)} samples\n")
    if args.json:
        print_json({"out": args.out, "keys": [dataset.key(position) for position in positions]})
    return 0


def _filter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help=SPEC)
    out_options(parser, needed=False)
    parser.add_argument(
        "--where",
        metavar="SQL",
        action="append",
        default=[],
        help="keep samples of which this condition is true, in SQLite's language. Columns: key, caption, "
        "words, characters, bytes, format, width, height, aspect (longer by shorter side), json (text); any "
        "other name is a field of the .json; of several, all must hold",
    )
    parser.add_argument(
        "--duplicates",
        action="store_true",
        help="drop pictures (clips, graphs, texts) whose bytes equal an earlier one's",
    )
    parser.add_argument(
        "--model", help="for the next two: a model folder, open_clip:NAME/PRETRAINED or hf:NAME"
    )
    parser.add_argument(
        "--min-score", type=float, metavar="S", help="least cosine of picture and caption, for example 0.25"
    )
    parser.add_argument(
        "--near-duplicates",
        type=float,
        metavar="S",
        help="drop pictures whose cosine with an earlier one is at least this, for example 0.95",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="where the model runs: cpu, cuda, mps (default: a GPU if there is one)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be dropped; needs no OUT")
    jobs_option(parser)
    json_option(parser)


def _filter(args: argparse.Namespace) -> int:
    from clipkit.errors import ConfigError
    from clipkit_data.tools.filter import DROPPED, Criteria, filter_shards
    from clipkit_data.tools.reshard import FAULTS

    if args.out is None and not args.dry_run:
        raise ConfigError("no folder to write to", hint="name one, or give --dry-run")
    all_hold = " AND ".join(f"({condition}\n)" for condition in args.where)  # a comment ends with its line
    where = args.where[0] if len(args.where) == 1 else all_hold or None
    criteria = Criteria(where, args.duplicates, args.min_score, args.near_duplicates, args.model)
    out = None if args.dry_run else args.out
    with continuable(out) if out else nullcontext():
        result = filter_shards(
            args.path,
            out,
            criteria,
            per_shard=args.per_shard,
            jobs=args.jobs,
            device=args.device,
            bars=progress,
        )
    words = f"{args.path}: {result['kept']} of {counted(result['samples'], 'sample')} "
    words += f"kept, in {counted(result['shards'], 'shard')}: {out}" if out else "would be kept"
    report(words, result["dropped"], str(Path(out) / DROPPED) if out else "", "dropped")
    if out and result["faults"]:
        report("in the source:", result["faults"], str(Path(out) / FAULTS), "fault")
    if args.json:
        print_json(result)
    return 0


def _pairs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="shards whose .json holds lists of keywords")
    parser.add_argument("out", help="the .tsv to write: sentence1, sentence2, score")
    parser.add_argument("--field", default="keywords", metavar="NAME", help="default: keywords")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    json_option(parser)


def _pairs(args: argparse.Namespace) -> int:
    from clipkit_data.dataset import ShardDataset
    from clipkit_data.sources import resolve_shards
    from clipkit_data.tools.sentences import graded_pairs, write_pairs

    dataset = ShardDataset(resolve_shards(args.path))
    records = (dataset[position] for position in range(len(dataset)))
    pairs = graded_pairs(records, args.field, count=args.count, seed=args.seed)
    write_pairs(Path(args.out), pairs)
    report(f"{args.out}: {len(pairs)} pairs", {})
    if args.json:
        print_json({"pairs": len(pairs), "out": args.out})
    return 0


LOOKING = {
    "pairs": Command(
        help="pairs of captions, scored by the keywords they share: to judge sentence encoders with",
        examples="  clipkit shards pairs sample:emoji/heldout pairs.tsv --field keywords_zh",
        arguments=_pairs_arguments,
        run=_pairs,
    ),
    "stats": Command(
        help="count: sizes, formats, captions, duplicates, faults",
        examples=(
            "  clipkit shards stats sample:emoji/train\n"
            "  clipkit shards stats shards/ --plot stats.png --json"
        ),
        arguments=_stats_arguments,
        run=_stats,
    ),
    "show": Command(
        help="a contact sheet: pictures with their captions",
        examples=(
            "  clipkit shards show sample:emoji/heldout sheet.png\n"
            "  clipkit shards show shards/ sheet.html --count 500 --random --seed 1\n"
            "  clipkit shards show shards/ two.png --keys 000000003 000010007"
        ),
        arguments=_show_arguments,
        run=_show,
    ),
    "filter": Command(
        help="copy the samples that pass tests: a condition, no duplicates, a model's score",
        examples=(
            '  clipkit shards filter shards/ wide/ --where "width >= 256 and aspect < 3"\n'
            "  clipkit shards filter shards/ --dry-run --duplicates --where \"caption like '%cat%'\"\n"
            "  clipkit shards filter shards/ good/ --model demo/model --min-score 0.25"
        ),
        arguments=_filter_arguments,
        run=_filter,
    ),
}
