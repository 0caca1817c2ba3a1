"""`clipkit classify`: which of some labels fits a picture, with no training for them."""

import argparse
from pathlib import Path
from typing import Any

from clipkit.cli import Command
from clipkit.cli.output import complain, print_json, print_table
from clipkit.errors import ClipkitError, InputError, NotFoundError


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder, open_clip:… or hf:… name")
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="pictures to classify")
    parser.add_argument(
        "--labels",
        required=True,
        metavar="A,B,C",
        help="labels with commas between, or @FILE with one label in each line",
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='words around a label, with {} in its place; several are averaged (default: "a photo of {}")',
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="show only the K best labels")
    parser.add_argument("--device", help="for example cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print a JSON list with one object for each file")


def read_labels(value: str) -> list[str]:
    """The labels in `a,b,c` or in the lines of `@FILE`. Raises: NotFoundError; InputError."""
    if value.startswith("@"):
        path = Path(value[1:])
        try:
            labels = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except OSError as error:
            raise NotFoundError(f"the label file {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"the label file {path} is not UTF-8 text") from error
        labels = [label for label in labels if label]
    else:
        labels = [label.strip() for label in value.split(",")] if value.strip() else []
    if not labels:
        raise InputError("there are no labels", hint="for example --labels cat,dog")
    if "" in labels:
        raise InputError(f"label {labels.index('') + 1} of {len(labels)} is empty")
    return labels


def _run(args: argparse.Namespace) -> int:
    labels = read_labels(args.labels)
    if args.top_k is not None and args.top_k < 1:
        raise InputError(f"--top-k is {args.top_k}, not 1 or more")
    from clipkit.embedder import Embedder
    from clipkit.zero_shot import ZeroShotClassifier

    embedder = Embedder(args.model, device=args.device)
    templates = {"templates": tuple(args.template)} if args.template else {}
    classifier = ZeroShotClassifier(embedder, labels, **templates)
    results: list[dict[str, Any]] = []
    failed = 0
    for file in args.files:
        try:
            scores = classifier.classify([file], top_k=args.top_k)[0]
        except ClipkitError as error:
            failed += 1
            complain(error.message, error.hint, code=1)
            continue
        keys = ("label", "score", "similarity")
        results.append({"file": str(file), "scores": [{key: score[key] for key in keys} for score in scores]})
    if args.json:
        print_json(results)
    elif results:
        rows = [
            (result["file"] if i == 0 else "", score["label"], score["score"], score["similarity"])
            for result in results
            for i, score in enumerate(result["scores"])
        ]
        print_table(rows, ("file", "label", "score", "similarity"))
    return 1 if failed else 0


command = Command(
    help="tell which of some labels fits a picture",
    examples=(
        '  clipkit classify demo/model picture.png --labels "cat,dog"\n'
        "  clipkit classify open_clip:ViT-B-32/laion2b_s34b_b79k *.jpg --labels @labels.txt --top-k 5 --json"
    ),
    arguments=_arguments,
    run=_run,
)
