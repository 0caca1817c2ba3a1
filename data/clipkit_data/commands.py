"""The commands `clipkit shards` and `clipkit embed`.

Arguments are declared here, in `clipkit_data.shard_commands`, `look_commands` and so on; the work is
imported when a command runs, so that `--help` stays quick.
"""

import argparse
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, progress
from clipkit_data.graph_commands import GRAPHS
from clipkit_data.known_commands import KNOWN
from clipkit_data.look_commands import LOOKING
from clipkit_data.moving_commands import MOVING
from clipkit_data.shard_commands import MAKING, report


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
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


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
    report(words, manifest["faults"], str(Path(args.out) / "faults.jsonl"))
    if args.json:
        print_json({name: manifest[name] for name in ("rows", "parts", "faults", "model", "source")})
    return 0


shards = Command(
    help="make, check, look at and filter shards: pictures with captions in tar files",
    examples=(
        "  clipkit shards pack photos/ shards/\n"
        "  clipkit shards check sample:emoji/train\n"
        "  clipkit shards stats sample:emoji/train\n"
        "  clipkit shards show sample:emoji/heldout sheet.png\n"
        '  clipkit shards filter shards/ wide/ --where "width >= 256 and aspect < 3"'
    ),
    subcommands={**MAKING, **LOOKING, **KNOWN, "moving": MOVING, "graphs": GRAPHS},
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
