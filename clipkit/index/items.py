"""What an index knows about each vector: its metadata and its thumbnail, by id.

Two files of a snapshot hold it. `items.sqlite` is the one that is read while serving: one row per id, the
metadata as JSON. `metadata/metadata_*.parquet` are the embeddings folder's columns, kept so that
clip-retrieval can serve a snapshot: it takes row r for id r, so a row of nulls stands where no item has that
id. A snapshot never changes, so SQLite opens it as immutable, without locks.
"""

import json
import math
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import ArtifactError, DataError, InputError, NotFoundError

ITEMS = "items.sqlite"
METADATA = "metadata"
_TABLE = "CREATE TABLE items(id INTEGER PRIMARY KEY, metadata TEXT NOT NULL, thumbnail BLOB)"
_INSERT = "INSERT INTO items(id, metadata, thumbnail) VALUES (?, ?, ?)"

Row = tuple[int, str, bytes | None]


class Items:
    """The items of one snapshot, read-only; threads may share it."""

    def __init__(self, path: Path, rows: int) -> None:
        uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
        try:
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
            found = connection.execute("SELECT count(*) FROM items").fetchone()[0]
        except sqlite3.Error as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        self._connection = connection
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, connection.close)
        if found != rows:
            self.close()
            raise ArtifactError(f"{path} holds {found} items, its manifest says {rows}")

    def metadata(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        """The metadata of some items, in the order of `ids`. Raises: NotFoundError."""
        return [json.loads(self._one("metadata", int(key))) for key in ids]

    def thumbnail(self, key: int) -> bytes | None:
        """An item's thumbnail as an encoded picture, or None when it has none. Raises: NotFoundError."""
        return self._one("thumbnail", int(key))

    def _one(self, column: str, key: int) -> Any:
        with self._lock:
            found = self._connection.execute(f"SELECT {column} FROM items WHERE id = ?", (key,)).fetchone()
        if found is None:
            raise NotFoundError(f"no item with id {key}")
        return found[0]


def create_items(
    path: Path, metadata: Sequence[Path], thumbnails: Sequence[Path], progress: Callable
) -> None:
    """Make `items.sqlite` from the parquet parts of an embeddings folder.

    Args:
        path: The database to make.
        metadata: Parquet parts with a column `id`; the other columns become the item's metadata.
        thumbnails: Parquet parts with the columns `id` and `image`; may be empty.
        progress: Called with the number of items that were done.
    """
    with closing(sqlite3.connect(path)) as connection, connection:
        # The file is in a temporary folder until it is complete: a journal would protect nothing.
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(_TABLE)
        for part in metadata:
            for rows in _batches(part, ["id"]):
                connection.executemany(_INSERT, ((row.pop("id"), _lenient_json(row), None) for row in rows))
                progress(len(rows))
        for part in thumbnails:
            for rows in _batches(part, ["id", "image"]):
                values = [(row["image"], row["id"]) for row in rows]
                done = connection.executemany("UPDATE items SET thumbnail = ? WHERE id = ?", values)
                if done.rowcount != len(rows):
                    raise DataError(f"{part}: {len(rows) - done.rowcount} thumbnails have an unknown id")


def _batches(part: Path, required: list[str]) -> Iterable[list[dict[str, Any]]]:
    try:
        with pq.ParquetFile(part) as file:
            missing = set(required) - set(file.schema_arrow.names)
            if missing:
                raise DataError(f"{part} has no column {', '.join(sorted(missing))}")
            for batch in file.iter_batches(batch_size=1024):
                yield batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{part} is not a readable Parquet file: {error}") from error


def _lenient_json(row: dict[str, Any]) -> str:
    """Parquet values as JSON: NaN becomes null, dates and the like their text."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def item_rows(
    ids_N: np.ndarray,
    metadata: Sequence[Mapping[str, Any]],
    thumbnails: Sequence[bytes | None] | None,
) -> list[Row]:
    """New items as rows for `edit_items`. Raises: InputError for a count that differs or what is no JSON."""
    for name, values in (("metadata", metadata), ("thumbnails", thumbnails)):
        if values is not None and len(values) != len(ids_N):
            raise InputError(f"{len(ids_N)} vectors came with {len(values)} {name}")
    rows: list[Row] = []
    for i, (key, entry) in enumerate(zip(ids_N.tolist(), metadata, strict=True)):
        thumbnail = thumbnails[i] if thumbnails is not None else None
        if not isinstance(entry, Mapping) or "id" in entry:
            raise InputError(f"metadata {i} is not a mapping without the key 'id'")
        if not isinstance(thumbnail, bytes | None):
            raise InputError(f"thumbnail {i} is {type(thumbnail).__name__}, not bytes")
        try:
            rows.append((key, json.dumps(dict(entry), ensure_ascii=False, allow_nan=False), thumbnail))
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata {i} is not JSON: {error}") from error
    return rows


def edit_items(path: Path, *, insert: Sequence[Row] = (), delete: Sequence[int] = ()) -> None:
    """Change a copy of `items.sqlite`; what is deleted is overwritten with zeros."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA secure_delete = ON")
        connection.executemany("DELETE FROM items WHERE id = ?", ((key,) for key in delete))
        connection.executemany(_INSERT, insert)


def copy_metadata(parts: Sequence[Path], target: Path, ids_N: np.ndarray) -> None:
    """Put the parquet parts of an embeddings folder into `target`; as they are when row r has id r already.

    Args:
        parts: Parquet parts with a column `id`.
        target: The folder to make.
        ids_N: (N,) int64: their ids, in order.
    """
    if np.array_equal(ids_N, np.arange(len(ids_N))):
        target.mkdir()
        for part in parts:
            shutil.copyfile(part, target / part.name)
    else:
        _write_metadata(_read_tables(parts), target)


def edit_metadata(source: Path, target: Path, *, keep: np.ndarray, insert: Sequence[Row] = ()) -> None:
    """Write into `target` those rows of the parts in `source` whose ids are in `keep`, and new ones.

    Raises:
        InputError: A new item's field has another type than the column of that name.
    """
    table = _read_tables(sorted(source.glob("*.parquet")))
    ids_N = table["id"].fill_null(-1).to_numpy()
    table = table.take(np.flatnonzero(np.isin(ids_N, keep)))
    if insert:
        table = pa.concat_tables([table, _typed(insert, table.schema)], promote_options="default")
    _write_metadata(table, target)


def _read_tables(parts: Sequence[Path]) -> pa.Table:
    return pa.concat_tables([pq.read_table(part) for part in parts], promote_options="permissive")


def _write_metadata(table: pa.Table, target: Path) -> None:
    """Write `target/metadata_0.parquet` so that row r belongs to id r, with rows of nulls where no id is r.

    Ids so large that most rows would be empty are left as they come; clip-retrieval cannot serve those.
    """
    ids_N = table["id"].to_numpy().astype(np.int64)
    rows = int(ids_N.max(initial=-1)) + 1
    if rows <= 2 * len(table) + 1000:
        places_R = np.full(rows, -1)
        places_R[ids_N] = np.arange(len(table))
        table = table.take(pa.array(places_R, mask=places_R < 0))
    target.mkdir()
    pq.write_table(table, target / "metadata_0.parquet")


def _typed(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """New items as a table whose columns have the types that columns of these names have already."""
    entries = [{**json.loads(metadata), "id": key} for key, metadata, _ in rows]
    columns: dict[str, pa.Array] = {}
    for name in dict.fromkeys(name for entry in entries for name in entry):
        known = schema.field(name).type if name in schema.names else pa.null()
        try:
            values = [entry.get(name) for entry in entries]
            columns[name] = pa.array(values, type=None if pa.types.is_null(known) else known)
        except pa.ArrowException as error:
            raise InputError(
                f"metadata field {name!r} does not fit the index, where it is {known}: {error}"
            ) from error
    return pa.table(columns)
