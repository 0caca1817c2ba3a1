"""Tables of pictures: CSV, TSV, JSONL or Parquet with the columns `path` and `caption`.

Rows come one by one as plain dicts, in the table's order; a row that is wrong comes with a fault instead of
stopping the reader, and takes no other row with it. That is why CSV and TSV are read by Python's csv module:
pyarrow's reader takes a quote that is never closed for the start of a field with everything after it, and
guesses types that change values (`02134`). JSONL is read line by line, because pyarrow's JSON reader gives up
on the whole file at the first broken line.
"""

import csv
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

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
        InputError: A column is missing, or two have one name.
        DataError: The file as a whole cannot be read.
    """
    for row, fault in _READERS[path.suffix.lower()](path, captions):
        yield (row, fault) if fault else _check(row, captions)


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
    twice = [name for place, name in enumerate(found) if name and name in found[:place]]
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}", hint="rename or remove one of them")


def _delimited(path: Path, captions: bool) -> Iterator[tuple[dict[str, Any], RowFault | None]]:
    """CSV and TSV: all values are text, except in columns that `_typed` turns into numbers."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _records(file, tabs=path.suffix.lower() == ".tsv")
        number, names = next(records, (1, list[str]()))
        if isinstance(names, tuple):
            raise DataError(f"{path}: the header cannot be read: {names[1]}", hint="name the columns there")
        if not _is_utf8(names):
            raise DataError(f"{path}: not UTF-8: the header in line {number}", hint="save the table as UTF-8")
        _need_columns(path, names, captions)
        faults: dict[int, tuple[dict[str, Any], RowFault]] = {}
        kept: list[list[str]] = []
        for place, (number, fields) in enumerate(records):
            if isinstance(fields, tuple):
                faults[place] = {}, fields
            elif _is_utf8(fields):
                kept.append(fields)
            else:
                faults[place] = _not_utf8(number, names, fields)
    columns = [[fields[place] for fields in kept] for place in range(len(names))]
    typed = (
        values if name in ("path", "caption") else _typed(values)
        for name, values in zip(names, columns, strict=True)
    )
    rows = zip(*typed, strict=True)
    for place in range(len(kept) + len(faults)):
        yield faults[place] if place in faults else (dict(zip(names, next(rows), strict=True)), None)


class _Lines:
    """The lines of a file; those after the first one that was `taken` can be given back, to be read again."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.taken: list[str] = []
        self._again: deque[str] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self.file)
        self.taken.append(line)
        return line

    def give_back(self) -> None:
        self._again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _records(file: TextIO, *, tabs: bool) -> Iterator[tuple[int, list[str] | RowFault]]:
    """The number of the first line of each record, the header's too, and its fields or what is wrong with it.

    Quotes are as in RFC 4180. Where they make no record, only one line is given up, and the next one is read
    for itself: so a quote that is never closed takes no rows with it. In a TSV it is a character like others.
    """
    mark = "\t" if tabs else ","
    lines, number, header = _Lines(file), 1, []
    reader = csv.reader(lines, delimiter=mark, strict=True)
    while True:
        lines.taken.clear()
        wrong, fields = "", []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = str(error)
        line = lines.taken[0].rstrip("\r\n")
        if not line:
            number += 1
            continue
        header = header or ([_unquoted(cell) for cell in line.split(mark)] if tabs else fields)
        if not wrong and _hold_rows(lines.taken, fields, header, mark):
            wrong = "there are whole rows inside it"
        if wrong or len(fields) != len(header):
            end = number + len(lines.taken) - 1
            lines.give_back()
            if tabs:
                wrong, fields = "", [_unquoted(cell) for cell in line.split(mark)]
            elif wrong and end > number:
                wrong = f"the quote that opens here is not closed as it should be, to line {end}: {wrong}"
        if wrong:
            yield number, ("invalid csv", f"line {number}: {wrong}: {_shown(line)}")
        elif len(fields) == len(header):
            yield number, fields
        else:
            count = f"{len(fields)} columns, expected {len(header)}"
            yield number, ("wrong number of columns", f"line {number}: {count}: {_shown(line)}")
        number += len(lines.taken)


def _hold_rows(lines: Sequence[str], fields: Sequence[str], header: Sequence[str], mark: str) -> bool:
    """Whether a record of several lines is rather rows: from a stray quote to another one that closes it.

    Of a TSV: the first line and a later one have as many cells as a row. Of a CSV, where commas stand in
    captions, too: two lines have, in the place of the path, a name with the suffix of the record's path.
    """
    if len(lines) == 1 or "path" not in header or len(fields) != len(header):
        return False
    cells = [line.rstrip("\r\n").split(mark) for line in lines]
    if mark == "\t":
        return len(cells[0]) == len(header) and any(len(line) >= len(header) for line in cells[1:])
    place = header.index("path")
    suffix = Path(fields[place]).suffix.lower()
    names = [(line[place], line[place - len(header)]) for line in cells if len(line) >= len(header)]
    return bool(suffix) and sum(any(name.lower().endswith(suffix) for name in pair) for pair in names) > 1


def _unquoted(cell: str) -> str:
    """A cell without the quotes round it, if it was quoted properly; else as it is."""
    inner = cell[1:-1].replace('""', "")
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner
    return cell[1:-1].replace('""', '"') if quoted else cell


def _typed(values: list[str]) -> Sequence[Any]:
    """A column as numbers, None where it is empty, if each can be written back as it stood; else as text.

    Numbers are written as Python writes integers or floats, or all with as many decimals as the first. So
    `02134`, `1.10` beside `1.9`, and integers beyond 64 bits stay text.
    """
    texts = [value for value in values if value]
    decimals = len(texts[0].partition(".")[2]) if texts else 0
    kinds: tuple[tuple[type[int | float], Callable[[Any, str], bool]], ...] = (
        (int, lambda number, text: str(number) == text and -(2**63) <= number < 2**63),
        (float, lambda number, text: repr(number).removesuffix(".0") == text.removesuffix(".0")),
        (float, lambda number, text: decimals > 0 and f"{number:.{decimals}f}" == text),
    )
    for kind, same in kinds:
        try:
            if all(math.isfinite(number := kind(text)) and same(number, text) for text in texts):
                return [kind(value) if value else None for value in values]
        except (ValueError, OverflowError):
            continue
    return values


def _is_utf8(fields: Sequence[str]) -> bool:
    """Whether a record that was decoded with `surrogateescape` was UTF-8."""
    text = "".join(fields)
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _shown(text: str) -> str:
    """The beginning of a text for a message, with U+FFFD for what is not UTF-8."""
    return text[:200].encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _not_utf8(number: int, names: list[str], fields: list[str]) -> tuple[dict[str, Any], RowFault]:
    """What can be shown of a row that is not UTF-8, and its fault."""
    place = next(place for place, field in enumerate(fields) if not _is_utf8([field]))
    fault = f"{names[place]} is not UTF-8", f"line {number}: {_shown(fields[place])}"
    return {"path": _shown(fields[names.index("path")])}, fault


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _need_columns(path, file.schema_arrow.names, captions)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield row, None
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


_READERS: dict[str, Callable[[Path, bool], Iterator[tuple[dict[str, Any], RowFault | None]]]] = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
