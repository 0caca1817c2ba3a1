"""Conditions on samples, written as SQL: `width >= 256 and caption like '%cat%'`.

The language is that of a `WHERE` in SQLite, which is also what evaluates it: rows go into a table in memory,
the condition is the user's, and nothing but reading that table is permitted. The columns are those of
`clipkit_data.tools.columns`, and `json`, the sample's whole `.json` as text; any other name is a field of the
`.json`, null where a sample lacks it. A name that is a word of SQL stands in double quotes: `"group" = 'a'`.
Nested fields are `json ->> '$.exif.iso'`.
"""

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from clipkit.errors import InputError
from clipkit_data.tools.columns import Columns

KNOWN = {
    "key": "TEXT",
    "caption": "TEXT",
    "words": "INTEGER",
    "characters": "INTEGER",
    "bytes": "INTEGER",
    "format": "TEXT",
    "width": "INTEGER",
    "height": "INTEGER",
    "aspect": "REAL",
    "json": "TEXT",
}
_PERMITTED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
_QUOTED = re.compile(r"""('(?:[^']|'')*')|"((?:[^"]|"")*)\"""")
_MISSING = re.compile(r"^no such column: (.+)$", re.DOTALL)


class Where:
    """A condition on a sample's columns and the fields of its `.json`.

    Args:
        text: What may stand after `WHERE` in SQLite; `caption regexp 'cat|dog'` works as well.

    Attributes:
        fields: The fields of the `.json` that the condition names.

    Raises:
        InputError: It is no such condition.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        # SQLite takes "name" for a text where no such column is; `name` is always a name.
        self._sql = _QUOTED.sub(lambda match: match[1] or f"`{match[2].replace('`', '``')}`", text)
        self.fields: list[str] = []
        while (missing := self._missing_column()) is not None:
            if "." in missing or missing.lower() in map(str.lower, self.fields):
                raise self._error(f"no such column: {missing}", "nested fields are json ->> '$.outer.inner'")
            self.fields.append(missing)

    def holds(self, rows: Sequence[tuple[Columns, dict[str, Any]]]) -> list[bool]:
        """Whether the condition is true of each row, given as columns and `.json`; null is not true."""
        values = []
        for number, (columns, meta) in enumerate(rows):
            text = json.dumps(meta)
            own = [text if name == "json" else _value(getattr(columns, name)) for name in KNOWN]
            values.append([number, *own, *(_value(meta.get(name)) for name in self.fields)])
        with self._table() as table:
            if values:
                marks = ", ".join("?" * len(values[0]))
                table.executemany(f"INSERT INTO samples VALUES ({marks})", values)
            try:
                true = {number for (number,) in self._select(table)}
            except sqlite3.Error as error:
                raise self._error(error) from error
        return [number in true for number in range(len(rows))]

    def check_fields(self, found: set[str]) -> None:
        """Refuse a name that no sample's `.json` has: a typo. Raises: InputError."""
        for name in self.fields:
            if name not in found:
                known = f"columns: {', '.join(KNOWN)}; fields: {', '.join(sorted(found)) or 'none'}"
                raise InputError(f"no sample's .json has the field {name!r} of {self.text!r}", hint=known)

    def _missing_column(self) -> str | None:
        """The next name that is no column yet. Raises: InputError for everything else that is wrong."""
        with self._table() as table:
            try:
                self._select(table)
            except (sqlite3.Error, sqlite3.Warning) as error:
                match = _MISSING.match(str(error))
                if match is None:
                    raise self._error(error) from error
                return match[1]
        return None

    def _select(self, table: sqlite3.Connection) -> list[tuple[int]]:
        table.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in _PERMITTED else sqlite3.SQLITE_DENY
        )
        # The newline ends a comment that the text may end with.
        return table.execute(f'SELECT "number of sample" FROM samples WHERE ({self._sql}\n)').fetchall()

    @contextmanager
    def _table(self) -> Iterator[sqlite3.Connection]:
        """An empty table of samples."""
        table = sqlite3.connect(":memory:")
        try:
            table.create_function("regexp", 2, _matches, deterministic=True)
            kinds = {"number of sample": "INTEGER", **KNOWN, **dict.fromkeys(self.fields, "NUMERIC")}
            named = ", ".join('"{}" {}'.format(name.replace('"', '""'), kind) for name, kind in kinds.items())
            table.execute(f"CREATE TABLE samples ({named})")
            yield table
        finally:
            table.close()

    def _error(self, reason: object, hint: str | None = None) -> InputError:
        known = f"columns: {', '.join(KNOWN)}, and the fields of the .json, in double quotes if need be"
        return InputError(f"the condition {self.text!r} is wrong: {reason}", hint=hint or known)


def _matches(pattern: str, text: object) -> bool:
    return text is not None and re.search(pattern, str(text)) is not None


def _value(value: Any) -> Any:
    """A value as SQLite takes it: lists and objects as JSON text, huge integers as floats."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value) if abs(value) < 2**1023 else None
    if isinstance(value, list | dict):
        return json.dumps(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
