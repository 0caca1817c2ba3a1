"""Tables of pictures: CSV, TSV, JSONL or Parquet with the columns `path` and `caption`.

Rows come one by one as plain dicts; a row that is wrong comes with a fault instead of stopping the reader.
CSV, TSV and Parquet are read by pyarrow. JSONL is read line by line, because pyarrow's JSON reader gives up
on the whole file at the first broken line.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipkit.errors import DataError, InputError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

RowFault = tuple[str, str]
"""Reason and detail."""


def read_table(path: Path, *, captions: bool = True) -> Iterator[tuple[dict[str, Any], RowFault | None]]:
    """The rows of a table, each with None or with what is wrong with it.

    Args:
        path: A file whose suffix is one of `TABLE_SUFFIXES`.
        captions: Whether the column `caption` must be there.

    Raises:
        InputError: A column is missing.
        DataError: The file as a whole cannot be read.
    """
    import pyarrow as pa

    reader = _READERS[path.suffix.lower()]
    try:
        for row, fault in reader(path, captions):
            yield (row, fault) if fault else _check(row, captions)
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


def _check(row: dict[str, Any], captions: bool) -> tuple[dict[str, Any], RowFault | None]:
    """A row with `path` and `caption` as text, or with its fault."""
    for column in ("path", "caption"):
        value = row.get(column)
        if isinstance(value, bytes):
            try:
                row[column] = value.decode("utf-8").strip()
            except UnicodeDecodeError:
                row[column] = value.decode("utf-8", "replace")
                return row, (f"{column} is not UTF-8", row[column])
        elif isinstance(value, str):
            row[column] = value.strip()
        elif value is not None:
            row[column] = str(value)
    if not row.get("path"):
        return row, ("missing path", "the column path is empty")
    if captions:
        row["caption"] = row.get("caption") or ""
    return {name: _plain(value) for name, value in row.items()}, None


def _plain(value: Any) -> Any:
    """A table's value as JSON has it: dates and decimals as text, bytes as text, NaN as null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _need_columns(path: Path, found: list[str], captions: bool) -> None:
    missing = [name for name in ("path", "caption") if name not in found and (captions or name == "path")]
    if missing:
        columns = f"column {missing[0]!r}" if len(missing) == 1 else "columns 'path' and 'caption'"
        raise InputError(
            f"{path} has no {columns}", hint=f"columns found: {', '.join(map(str, found)) or 'none'}"
        )


def _delimited(path: Path, captions: bool) -> Iterator[tuple[dict[str, Any], RowFault | None]]:
    """CSV and TSV; path and caption are taken as bytes, so that bad UTF-8 costs a row and not the file."""
    import pyarrow as pa
    from pyarrow import csv

    broken: list[RowFault] = []

    def keep(row: csv.InvalidRow) -> str:
        reason = f"{row.actual_columns} columns, expected {row.expected_columns}"
        line = f"row {row.number}: " if row.number is not None else ""
        broken.append(("wrong number of columns", f"{line}{reason}: {row.text[:200]}"))
        return "skip"

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    if not path.stat().st_size:
        _need_columns(path, [], captions)
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(use_threads=False),  # only then do broken rows carry their number
        parse_options=csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep
        ),
        convert_options=csv.ConvertOptions(column_types={"path": pa.binary(), "caption": pa.binary()}),
    )
    _need_columns(path, table.column_names, captions)
    for batch in table.to_batches():
        for row in batch.to_pylist():
            yield row, None
    for fault in broken:
        yield {}, fault


def _jsonl(path: Path, captions: bool) -> Iterator[tuple[dict[str, Any], RowFault | None]]:
    """One object per line; the columns are those of the first object."""
    first = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except ValueError as error:
                yield {}, ("invalid json", f"line {number}: {error}")
                continue
            if not isinstance(row, dict):
                yield {}, ("invalid json", f"line {number}: expected an object")
                continue
            if first:
                _need_columns(path, list(row), captions)
                first = False
            yield row, None
    if first:
        _need_columns(path, [], captions)


def _parquet(path: Path, captions: bool) -> Iterator[tuple[dict[str, Any], RowFault | None]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _need_columns(path, file.schema_arrow.names, captions)
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield row, None


_READERS: dict[str, Callable[[Path, bool], Iterator[tuple[dict[str, Any], RowFault | None]]]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
