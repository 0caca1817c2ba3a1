"""What a SOURCE is: shards, a folder of pictures, or a table of paths and captions.

Commands take one word for all of them. `open_source` turns it into something with a length whose records can
be read in any order, so that packing, embedding and training need not know where pictures come from.
`sample:NAME` stands for shards that ship with clipkit; `{00000..00099}` and `*` stand for many shards.
Shards may also lie elsewhere (`s3://…`, `https://…`); `clipkit_data.remote.cache` brings them here.
"""

import glob
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from braceexpand import braceexpand

from clipkit.errors import InputError, NotFoundError
from clipkit_data.loose import folder_source, table_source
from clipkit_data.records import Record, RecordError, RecordSource, SampleFault
from clipkit_data.remote.storage import is_http, is_remote, list_shards
from clipkit_data.tables import TABLE_SUFFIXES

if TYPE_CHECKING:
    from clipkit_data.dataset import ShardDataset
    from clipkit_data.lines import LineDataset

DRAWN = {
    "moving": ("train", "recombined", "heldout"),
    "families": ("train", "heldout"),
    "digits": ("train", "heldout"),
}
"""Splits of the samples that are drawn on first use, by `clipkit_data.tools.drawn`."""
STREAMED = ("pipe:", "stream:")  # what `clipkit_data.batches.stream` reads, and nothing else does
WHAT = (
    "a SOURCE is shards (a folder of .tar, one .tar, data/{00000..00009}.tar, sample:emoji/train, or an URL "
    "as in s3://bucket/folder), a folder of pictures, or a table "
    f"({', '.join(TABLE_SUFFIXES)}) with columns path and caption"
)


def _samples() -> Path:
    return Path(str(files("clipkit_data"))) / "samples"


def sample_names() -> list[str]:
    """The shards that ship with clipkit or are drawn on first use, as `sample:` takes them."""
    shipped = {tar.parent.relative_to(_samples()).as_posix() for tar in _samples().rglob("*.tar")}
    return sorted(shipped | {f"{name}/{split}" for name, splits in DRAWN.items() for split in splits})


def _sample_folder(name: str) -> Path:
    """Where a sample's shards lie, drawn now if they never were."""
    sample, _, split = name.partition("/")
    if sample not in DRAWN:
        return _samples() / name
    # by its name: what draws clips reads the emoji through this module
    return import_module("clipkit_data.tools.drawn").drawn_sample(sample) / split


def _sample_shards(name: str) -> list[Path]:
    """The shards of one sample, or of all samples whose names begin so."""
    known = sample_names()
    chosen = [other for other in known if other == name or other.startswith(f"{name}/")]
    if not chosen:
        raise NotFoundError(f"no sample named {name!r}", hint=f"known: {', '.join(known) or 'none'}")
    return [path for other in chosen for path in sorted(_sample_folder(other).glob("*.tar"))]


def resolve_shards(spec: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """The shards that a path or URL stands for, in order: local ones as paths, remote ones as URLs.

    Whether a remote shard that is named outright is there is not asked: that shows when it is read.

    Args:
        spec: A folder (its `*.tar`, by name), one `.tar`, `sample:emoji/train`, a pattern such as
            `data/{00000..00010}.tar`, `sample:emoji/{train,heldout}` or `data/*.tar`, the URL of any of
            these, or several of these.

    Raises:
        NotFoundError: Nothing is there, or a local shard of a pattern is missing.
        InputError: The braces do not match, a server cannot list, or it is a command.
        DataError: A server cannot be reached.
    """
    if not isinstance(spec, str | Path):
        return [path for part in spec for path in resolve_shards(part)]
    path, text = Path(spec), str(spec)
    if is_streamed(text):
        raise InputError(f"{spec}: can only be streamed", hint="its samples have no order that could be kept")
    remote = is_remote(text)
    if not remote and path.is_file():
        return [path]
    if not remote and path.is_dir():
        found = sorted(item for item in path.iterdir() if item.suffix == ".tar" and item.is_file())
        if not found:
            raise NotFoundError(
                f"no shards in {path}",
                hint="a shard is a .tar file; clipkit shards pack makes them of pictures",
            )
        return [*found]
    if "{" in text:
        names = expand_braces(text)
        if names != [text]:
            return resolve_shards(names)
    if text.startswith("file://"):
        return resolve_shards(text.removeprefix("file://"))
    if remote:
        return [text] if _is_tar(text) and "*" not in text else [*list_shards(text)]
    if text.startswith("sample:"):
        return [*_sample_shards(text.removeprefix("sample:").strip("/"))]
    found = sorted(Path(name) for name in glob.glob(text)) if "*" in text else []
    if not found:
        raise NotFoundError(
            f"no such shards: {spec}", hint="give a folder of .tar files, one .tar or a pattern"
        )
    return [*found]


def open_dataset(spec: str | Path, name: str | None = None) -> "ShardDataset | LineDataset":
    """What training reads, by position: shards, or files of sentences (`corpus.txt`, `nli-{0..9}.csv`).

    Args:
        spec: As in `resolve_shards`; a name that ends like a file of sentences (`clipkit_data.lines`) stands
            for such files, which must lie on this machine.
        name: What to call it in messages and manifests.

    Raises:
        NotFoundError, InputError, DataError: As `resolve_shards` and the two datasets.
    """
    from clipkit_data.dataset import ShardDataset
    from clipkit_data.lines import LINE_SUFFIXES, LineDataset

    text = str(spec).removeprefix("file://")
    if not text.lower().endswith(LINE_SUFFIXES):
        return ShardDataset(resolve_shards(spec), name=name or str(spec))
    if is_remote(text) or is_streamed(text):
        raise InputError(f"{spec}: files of sentences must lie on this machine", hint="copy them here")
    if not any(mark in text for mark in "{*") and not Path(text).exists():
        raise NotFoundError(f"no such file: {text}")
    return LineDataset(resolve_shards(text), name=name or str(spec))


def is_streamed(spec: str | Path) -> bool:
    """Whether a SOURCE asks for `clipkit_data.batches.stream`: `pipe:COMMAND` or `stream:SHARDS`."""
    return str(spec).startswith(STREAMED)


def expand_braces(text: str) -> list[str]:
    """`{00000..00002}` and `{a,b}` written out. Raises: InputError."""
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise InputError(f"{text}: the braces do not match") from error


def _is_tar(url: str) -> bool:
    """Whether an URL names one shard; a query may follow only in HTTP."""
    return (url.partition("?")[0] if is_http(url) else url).endswith(".tar")


def is_shards(spec: str | Path) -> bool:
    """Whether a SOURCE is shards (and not pictures or a table)."""
    text, path = str(spec), Path(spec)
    if text.startswith("sample:") or is_streamed(text) or is_remote(text):
        return True
    if ("{" in text or "*" in text) and not path.exists():
        return True
    return path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))


def open_source(spec: str | Path, *, captions: bool = False) -> RecordSource:
    """A SOURCE as records that can be read in any order.

    Args:
        spec: See `WHAT`.
        captions: Refuse a table without captions.

    Raises:
        NotFoundError: There is no such thing.
        InputError: It is there, but it is no SOURCE.
    """
    if is_shards(spec):
        from clipkit_data.dataset import ShardDataset

        return ShardDataset(resolve_shards(spec), name=str(spec))
    path = Path(spec)
    if path.is_dir():
        return folder_source(path)
    if not path.exists():
        raise NotFoundError(f"no such file or folder: {path}", hint=WHAT)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return table_source(path, captions=captions)
    raise InputError(f"{path} is no SOURCE", hint=WHAT)


def iter_pairs(spec: str | Path) -> Iterator[Record | SampleFault]:
    """Every picture of a SOURCE with its caption, in order; a fault where one cannot be read."""
    source = open_source(spec, captions=True)
    for position in range(len(source)):
        try:
            yield source[position]
        except RecordError as error:
            yield SampleFault(position, source.key(position), error.reason, error.message)
    yield from getattr(source, "faults", [])
