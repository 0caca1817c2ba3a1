"""The commands `clipkit shards` and `clipkit embed`.

Arguments are declared here; the work is imported when a command runs, so that `--help` stays quick.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table, progress


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _report(words: str, faults: Mapping[str, int], listed: str = "") -> None:
    """Say on stderr what was done and what was left out."""
    lines = [words, *(f"  left out: {reason} ×{count}" for reason, count in faults.items())]
    if faults and listed:
        lines.append(f"  each is listed in {listed}")
    sys.stderr.write("\n".join(lines) + "\n")


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="a folder of pictures, or a CSV, TSV, JSONL or Parquet file with columns path, caption"
    )
    parser.add_argument("out", help="the folder of shards to make")
    parser.add_argument(
        "--per-shard", type=int, default=10_000, metavar="N", help="samples per shard (default: 10000)"
    )
    _json_option(parser)


def _pack(args: argparse.Namespace) -> int:
    from clipkit_data.pack import FAULTS, pack

    with progress("packing") as bar:
        result = pack(args.source, args.out, per_shard=args.per_shard, progress=bar.advance)
    words = f"{args.out}: {result['samples']} samples in {result['shards']} shards"
    _report(words, result["faults"], str(Path(args.out) / FAULTS))
    if args.json:
        print_json(result)
    return 0


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a folder of shards, one .tar, a pattern or sample:NAME")
    parser.add_argument(
        "--quick", action="store_true", help="only the tar files' structure; decode no picture"
    )
    parser.add_argument("--json", action="store_true", help="print the faults as one line of JSON")


def _check(args: argparse.Namespace) -> int:
    from clipkit_data.shards import check_shard
    from clipkit_data.sources import resolve_shards

    paths = resolve_shards(args.path)
    faults: list[dict[str, Any]] = []
    samples = 0
    with progress("checking", len(paths)) as bar:
        for path in paths:
            index = check_shard(path, decode=not args.quick)
            faults += [fault.to_json() for fault in index.faults]
            samples += len(index.samples)
            bar.advance()
    if args.json:
        print_json(faults)
    elif faults:
        columns = ("shard", "sample", "offset", "reason", "detail")
        print_table(
            [["" if fault[name] is None else fault[name] for name in columns] for fault in faults], columns
        )
    sys.stderr.write(f"{args.path}: {len(paths)} shards, {samples} readable samples, {len(faults)} faults\n")
    return 1 if faults else 0


def _emoji_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", help="the folder to make: train/ and heldout/ below it")
    _json_option(parser)


def _emoji(args: argparse.Namespace) -> int:
    from clipkit_data.emoji import write_emoji_shards

    with progress("rendering") as bar:
        result = write_emoji_shards(Path(args.out), progress=bar.advance)
    sys.stderr.write(f"{args.out}: {result['pictures']} pictures, {result['heldout']} of them held out\n")
    if args.json:
        print_json(result)
    return 0


def _embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, open_clip:NAME/PRETRAINED or hf:NAME")
    parser.add_argument("source", help="shards, a folder of pictures, or a table with a column path")
    parser.add_argument("out", help="the embeddings folder to make; an unfinished one is continued")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--thumbnail-size",
        type=int,
        default=256,
        metavar="PX",
        help="longest side; 0 writes none (default: 256)",
    )
    parser.add_argument(
        "--part-rows", type=int, default=100_000, metavar="N", help="rows per part (default: 100000)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that decode pictures")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cpu)")
    _json_option(parser)


def _embed(args: argparse.Namespace) -> int:
    from clipkit_data.embedding import embed as run
    from clipkit_data.sources import open_source

    source = open_source(args.source)
    with progress("embedding", len(source)) as bar:
        manifest = run(
            args.model,
            source,
            args.out,
            batch_size=args.batch_size,
            thumbnail_size=args.thumbnail_size,
            part_rows=args.part_rows,
            workers=args.workers,
            device=args.device,
            progress=bar.advance,
        )
    words = f"{args.out}: {manifest['rows']} embeddings of dimension {manifest['model']['dim']}"
    _report(words, manifest["faults"], str(Path(args.out) / "faults.jsonl"))
    if args.json:
        print_json({name: manifest[name] for name in ("rows", "parts", "faults", "model", "source")})
    return 0


shards = Command(
    help="make and check shards: pictures with captions in tar files",
    examples=(
        "  clipkit shards pack photos/ shards/\n"
        "  clipkit shards pack captions.csv shards/ --per-shard 1000\n"
        "  clipkit shards check sample:emoji/train"
    ),
    subcommands={
        "pack": Command(
            help="make shards from your own pictures",
            examples=(
                "  clipkit shards pack photos/ shards/       # caption from photo.txt, else the file name\n"
                "  clipkit shards pack captions.csv shards/  # columns path, caption; others are kept"
            ),
            arguments=_pack_arguments,
            run=_pack,
        ),
        "check": Command(
            help="verify shards; exit code 1 when there are faults",
            examples="  clipkit shards check shards/\n  clipkit shards check sample:emoji/heldout --json",
            arguments=_check_arguments,
            run=_check,
        ),
        "emoji": Command(
            help="render the emoji sample shards (needs fonts-noto-color-emoji and unicode-cldr-core)",
            examples="  clipkit shards emoji emoji-shards/",
            arguments=_emoji_arguments,
            run=_emoji,
        ),
    },
)

embed = Command(
    help="embed pictures and captions with a model",
    examples=(
        "  clipkit embed demo/model sample:emoji/train embeddings/\n"
        "  clipkit embed open_clip:ViT-B-32/laion2b_s34b_b79k photos/ embeddings/"
    ),
    arguments=_embed_arguments,
    run=_embed,
)
