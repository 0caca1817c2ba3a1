"""`clipkit index build` and `clipkit index info`: make an index of embeddings, and say what it holds."""

import argparse
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table, progress


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("embeddings", metavar="EMBEDDINGS", type=Path, help="folder that clipkit embed wrote")
    parser.add_argument("out", metavar="OUT", type=Path, help="index folder; an existing index is replaced")
    parser.add_argument("--engine", default="flat", help="index engine (default: flat, exact search)")
    parser.add_argument("--json", action="store_true", help="print what was built as JSON")


def _build(args: argparse.Namespace) -> None:
    from clipkit.files import read_manifest
    from clipkit.index import build_index

    rows = read_manifest(args.embeddings, "embeddings", verify=False).get("rows")
    with progress("Indexing", total=rows) as task:
        build_index(args.embeddings, args.out, engine=args.engine, progress=task.advance)
    _show(args.out, args.json)


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(args: argparse.Namespace) -> None:
    _show(args.index, args.json)


def _show(path: Path, as_json: bool) -> None:
    """Open the index, which verifies every file, and print what it holds."""
    from clipkit.index import Index

    with Index.open(path) as index:
        manifest, folder = index.manifest, index.current.folder
        report = {
            "index": str(path),
            "snapshot": folder.name,
            **{key: manifest.get(key) for key in ("rows", "dim", "metric", "engine", "created", "parent")},
            "bytes": sum(item.stat().st_size for item in folder.rglob("*") if item.is_file()),
            "embeddings": manifest.get("embeddings"),
            "model": manifest["model"],
        }
    if as_json:
        print_json(report)
        return
    model = report.pop("model")
    parent = report["parent"]
    report["parent"] = parent["snapshot"] if parent else "none"
    rows = [(key, str(value)) for key, value in report.items()]
    rows += [(f"model {key}", str(value)) for key, value in model.items()]
    print_table(rows, ("field", "value"))


command = Command(
    help="build an index of embeddings, or describe one",
    examples=("  clipkit index build demo/embeddings demo/index\n  clipkit index info demo/index --json"),
    subcommands={
        "build": Command(
            help="build an index from an embeddings folder",
            examples="  clipkit index build demo/embeddings demo/index",
            arguments=_build_arguments,
            run=_build,
        ),
        "info": Command(
            help="verify an index and say what it holds",
            examples="  clipkit index info demo/index\n  clipkit index info demo/index --json",
            arguments=_info_arguments,
            run=_info,
        ),
    },
)
