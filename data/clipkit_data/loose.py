"""Pictures that lie in files of their own: a folder of them, or a table of their paths.

Captions come from a table's column, from a `.txt` beside the picture, or from its name. What cannot be a
picture keeps its place as a fault: positions are a table's rows, and nothing is passed over in silence.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.errors import NotFoundError
from clipkit_data.records import Record, RecordError, parse_caption, parse_meta
from clipkit_data.tables import RowFault, read_table

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
# Pictures that clipkit does not decode: listed all the same, so that they are reported and not passed over.
OTHER_PICTURES = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2")


@dataclass(frozen=True, slots=True)
class Row:
    """One picture of a folder or table: the file, what it is called, its caption and its other columns."""

    file: Path
    key: str
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    beside: bool = False
    """Whether a `.txt` and a `.json` of the same name beside the picture are its caption and meta."""
    fault: RowFault | None = None
    """Why there is no picture: a broken line of a table, a folder that cannot be read."""


class FileSource:
    """Pictures that lie in files of their own, with captions from a folder or a table.

    Args:
        rows: The pictures in order; what cannot be one keeps its place, so that positions are a table's rows.
        name: What to call them in messages and manifests.
    """

    def __init__(self, rows: Sequence[Row], name: str = "pictures") -> None:
        self.name = name
        self.rows = rows

    @property
    def has_captions(self) -> bool:
        """Whether any picture has a caption (a folder always has: the file name stands in)."""
        return any(row.caption is not None for row in self.rows)

    def key(self, position: int) -> str:
        """The path of the picture at a position."""
        return self.rows[position].key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Record:
        """The record at a position. Raises: RecordError."""
        row = self.rows[position]
        if row.fault:
            reason, detail = row.fault
            raise RecordError(detail, reason)
        try:
            image = row.file.read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            reason = "missing file" if missing else "unreadable file"
            raise RecordError(f"{row.file}: {error.strerror or error}", reason) from error
        except ValueError as error:  # a NUL inside the path
            raise RecordError(f"{row.key!r} is no path: {error}", "missing file") from error
        return Record((0, position), row.key, image, *_caption(row))

    def fingerprint(self) -> str:
        """SHA-256 over paths, captions and other columns, and over the sizes and times of all files."""
        digest = hashlib.sha256()
        for row in self.rows:
            files = [] if row.fault else [row.file, *_beside(row)]
            line = [row.key, [_stamp(file) for file in files], row.caption, row.meta, row.fault]
            digest.update(
                json.dumps(line, ensure_ascii=False, sort_keys=True, default=str).encode(
                    "utf-8", "surrogatepass"
                )
            )
        return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Bytes and last change (ns) of a file, None when there is none (or no such path can be)."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _beside(row: Row) -> tuple[Path, ...]:
    """The `.txt` and the `.json` that may lie beside a row's picture."""
    return (row.file.with_suffix(".txt"), row.file.with_suffix(".json")) if row.beside else ()


def _caption(row: Row) -> tuple[str | None, dict[str, Any]]:
    """Caption and meta of a row: what stands beside the picture in `.txt` and `.json` comes first."""
    caption, meta = row.caption, row.meta
    if row.beside:
        text, data = _beside(row)
        try:
            caption = parse_caption(text.read_bytes(), str(text)) if text.is_file() else caption
            meta = parse_meta(data.read_bytes(), str(data)) if data.is_file() else meta
        except OSError as error:
            raise RecordError(f"{error.filename}: {error.strerror}", "unreadable file") from error
    return caption, meta


def caption_from_name(path: Path) -> str:
    """A caption from a file name: `red_fire-truck.jpg` is "red fire truck"."""
    return " ".join(path.stem.replace("_", " ").replace("-", " ").split())


def folder_source(folder: Path) -> FileSource:
    """All pictures below a folder and its links, by path; hidden files and folders are passed over.

    A folder that cannot be read, and a link to nothing, is a row with a fault.
    """
    rows: list[Row] = []

    def add(path: Path, caption: str | None = None, fault: RowFault | None = None) -> None:
        rows.append(Row(path, path.relative_to(folder).as_posix(), caption, beside=True, fault=fault))

    def unreadable(error: OSError) -> None:
        add(Path(error.filename), fault=("unreadable folder", f"{error.filename}: {error.strerror}"))

    for path in _files(folder, unreadable):
        if path.suffix.lower() in PICTURE_SUFFIXES + OTHER_PICTURES:
            add(path, caption_from_name(path))
        elif path.is_symlink() and not path.exists():
            add(path, fault=("broken link", f"{path}: there is no {os.readlink(path)}"))
    if not rows:
        raise NotFoundError(f"no pictures in {folder}", hint=f"looked for {', '.join(PICTURE_SUFFIXES)}")
    return FileSource(sorted(rows, key=lambda row: row.file), name=str(folder))


def _files(folder: Path, unreadable: Callable[[OSError], None]) -> Iterator[Path]:
    """The files below a folder that are not hidden.

    Links to folders are followed after everything else, and no folder is read twice: so links in a circle
    end, and what a link shows once more keeps its own name.
    """
    seen: set[tuple[int, int]] = set()
    tops = [folder]
    for top in tops:  # it grows
        for where, folders, names in os.walk(top, onerror=unreadable):
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            tops += [Path(where, name) for name in folders if os.path.islink(os.path.join(where, name))]
            yield from (Path(where, name) for name in names if not name.startswith("."))


def table_source(path: Path, *, captions: bool) -> FileSource:
    """The pictures that a table names; relative paths start at the table's folder.

    Args:
        path: CSV, TSV, JSONL or Parquet with a column `path`, and `caption` unless `captions` is false.
        captions: Whether the column `caption` must be there.
    """
    rows = []
    for row, fault in read_table(path, captions=captions):
        if fault:
            rows.append(Row(path, str(row.get("path") or ""), None, fault=fault))
            continue
        name, caption = row.pop("path"), row.pop("caption", None)
        rows.append(Row(path.parent / name, name, caption, row))
    return FileSource(rows, name=str(path))
