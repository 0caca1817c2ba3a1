"""`clipkit search`: find the pictures of an index that are most like a text or a picture."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table
from clipkit.errors import ClipkitError, InputError
from clipkit.files import model_folder, read_manifest

if TYPE_CHECKING:
    from clipkit.embedder import Embedder
    from clipkit.index import Index


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", type=Path, help="index folder")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what to look for, in words")
    parser.add_argument("--image", metavar="FILE", type=Path, help="a picture to look for instead of words")
    parser.add_argument("-k", type=int, default=10, help="how many results, 1 to 1000 (default: 10)")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="model folder, open_clip:… or hf:… name (default: the model that the index names)",
    )
    parser.add_argument("--device", help="for example cpu or cuda (default: a GPU if there is one)")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list of rank, id, similarity, metadata"
    )


def _run(args: argparse.Namespace) -> None:
    from clipkit.images import decode_image
    from clipkit.index import Index, check_k

    if (args.text is None) == (args.image is None):
        raise InputError("give a text or --image FILE, one of the two")
    if args.text is not None and not args.text.strip():
        raise InputError("the text is empty")
    check_k(args.k)
    picture = args.image
    if picture is not None:
        decode_image(picture, name=str(picture))  # a bad file is said before a model is loaded
    with Index.open(args.index) as index:
        embedder = _embedder(index, args.model, args.device)
        query_1D = embedder.texts([str(args.text)]) if picture is None else embedder.images([picture])
        similarities_1k, ids_1k = index.search(query_1D, args.k)
        found = [
            (int(key), float(s)) for key, s in zip(ids_1k[0], similarities_1k[0], strict=True) if key >= 0
        ]
        results = [
            {"rank": rank, "id": key, "similarity": similarity, "metadata": metadata}
            for rank, ((key, similarity), metadata) in enumerate(
                zip(found, index.items(key for key, _ in found), strict=True), start=1
            )
        ]
    if args.json:
        print_json(results)
    else:
        rows = [(r["rank"], r["id"], r["similarity"], title(r["metadata"])) for r in results]
        print_table(rows, ("rank", "id", "similarity", "item"))


def _embedder(index: "Index", name: str | None, device: str | None) -> "Embedder":
    """The embedder of the index's model, or of the one named. Raises: MismatchError when they differ."""
    from clipkit.embedder import Embedder

    recorded = name is None
    if name is None:
        name = index.manifest["model"].get("name")
        if not name:
            raise InputError(f"the index {index.path} does not name its model", hint="pass --model MODEL")
        # A model folder that was moved together with its index is still beside it, whatever else now has
        # its old name.
        beside = index.path.resolve().parent / Path(name).name
        if ":" not in name and not _is_model(Path(name), index) and _is_model(beside, index):
            name = str(beside)
    try:
        embedder = Embedder(name, device=device)
    except ClipkitError as error:
        if recorded:
            error.hint = (
                error.hint or f"the index {index.path} names this model: pass --model if it has moved"
            )
        raise
    index.check_model(embedder.model)
    return embedder


def _is_model(folder: Path, index: "Index") -> bool:
    """Whether a folder says that it is the model the index was made with."""
    try:
        return (
            read_manifest(model_folder(folder), "model", verify=False).get("fingerprint")
            == index.model_fingerprint
        )
    except ClipkitError:
        return False


def title(metadata: dict[str, Any]) -> str:
    """What to call an item in a table: its name, else its caption, else its path."""
    for key in ("name", "caption", "image_path"):
        if metadata.get(key):
            return " ".join(str(metadata[key]).split())[:80]
    return ""


command = Command(
    help="search an index with words or a picture",
    examples=(
        '  clipkit search demo/index "a woman firefighter" -k 5\n'
        "  clipkit search demo/index --image picture.png --json"
    ),
    arguments=_arguments,
    run=_run,
)
