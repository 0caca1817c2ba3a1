"""Conditions on samples, written as SQL: `width >= 256 and caption like '%cat%'`.

The language is that of a `WHERE` in SQLite, which is also what evaluates it: rows go into a table in memory,
the condition is the user's, and nothing but reading that table is permitted. The table holds a block of the
samples, never all, so a condition that looks beyond its own row (a SELECT, an aggregate) is refused. The
columns are those of `clipkit_data.tools.columns`, and `json`, the sample's whole `.json` as text; any other
name is a field of the `.json`, null where a sample lacks it. A name that is a word of SQL stands in double
quotes: `"group" = 'a'`. Nested fields are `json ->> '$.exif.iso'`.
"""

import json
import re
import sqlite3
from collections.abc import Iterable, Sequence
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
_NUMBER = '"number of sample"'
# The newline ends a comment that the text may end with.
_WHERE = f"SELECT {_NUMBER} FROM samples WHERE ({{}}\n)"
# What only looks like a condition between brackets, `1) LIMIT (1`, is none here; and all of `a AND b` is
# evaluated, so that a bad pattern shows before anything is read.
_TRIAL = "SELECT CASE {}\n WHEN 1 THEN 1 END FROM samples"
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
        """Whether the condition is true of each row, given as columns and `.json`; null is not true.

        Raises:
            InputError: A mistake that only shows with these rows, such as a pattern out of the `.json`.
        """
        values = []
        for number, (columns, meta) in enumerate(rows):
            text = _json(meta)
            own = [text if name == "json" else _value(getattr(columns, name)) for name in KNOWN]
            values.append([number, *own, *(_value(meta.get(name)) for name in self.fields)])
        true = set(self._select(_WHERE, values))
        return [number in true for number in range(len(rows))]

    def check_fields(self, found: set[str]) -> None:
        """Refuse a name that no sample's `.json` has: a typo. Raises: InputError."""
        for name in self.fields:
            if name not in found:
                known = f"columns: {', '.join(KNOWN)}; fields: {', '.join(sorted(found)) or 'none'}"
                raise InputError(f"no sample's .json has the field {name!r} of {self.text!r}", hint=known)

    def _missing_column(self) -> str | None:
        """The next name that is no column yet. Raises: InputError for everything else that is wrong."""
        nulls = [0, *[None] * (len(KNOWN) + len(self.fields))]
        try:
            for query in (_WHERE, _TRIAL):
                self._select(query, [nulls])
        except _MissingColumnError as error:
            return str(error)
        return None

    def _select(self, query: str, rows: Iterable[Sequence[Any]]) -> list[Any]:
        """What a query finds in a table of these rows. Raises: InputError, _MissingColumnError."""
        kinds = {**KNOWN, **dict.fromkeys(self.fields, "NUMERIC")}
        named = ", ".join('"{}" {}'.format(name.replace('"', '""'), kind) for name, kind in kinds.items())
        guard = _Guard()
        table = sqlite3.connect(":memory:")
        try:
            # Without a rowid, `rowid` and `oid` are fields of the .json like any other name.
            table.execute(f"CREATE TABLE samples ({_NUMBER} INTEGER PRIMARY KEY, {named}) WITHOUT ROWID")
            table.executemany(f"INSERT INTO samples VALUES (?{', ?' * len(kinds)})", rows)
            table.create_function("regexp", 2, guard.regexp, deterministic=True)
            table.set_authorizer(guard.permit)
            return [found for (found,) in table.execute(query.format(self._sql))]
        except (sqlite3.Error, sqlite3.Warning) as error:
            if match := _MISSING.match(str(error)):
                raise _MissingColumnError(match[1]) from error
            raise (self._error(*guard.why) if guard.why else self._error(error)) from error
        finally:
            table.close()

    def _error(self, reason: object, hint: str | None = None) -> InputError:
        known = f"columns: {', '.join(KNOWN)}, and the fields of the .json, in double quotes if need be"
        return InputError(f"the condition {self.text!r} is wrong: {reason}", hint=hint or known)


class _MissingColumnError(Exception):
    """A name that is no column."""


class _Guard:
    """What a query may do; `why` it failed in here, reason and hint, of which SQLite knows nothing."""

    def __init__(self) -> None:
        self.why: tuple[str, str] | None = None
        self._selects = 0

    def permit(self, action: int, *_: object) -> int:
        """Whether it may do something: read, by the one SELECT that is ours."""
        self._selects += action == sqlite3.SQLITE_SELECT
        if self._selects > 1:
            hint = "a condition sees one sample at a time; a list of values is (1, 2, 3)"
            self.why = "it holds a SELECT or VALUES of its own", hint
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in _PERMITTED else sqlite3.SQLITE_DENY

    def regexp(self, pattern: object, text: object) -> bool:
        """`text regexp pattern`; a null has no match."""
        try:
            found = pattern is not None and re.search(str(pattern), "" if text is None else str(text))
        except (re.error, OverflowError, RecursionError) as error:
            hint = "a character that stands for itself has a backslash before it"
            self.why = f"{pattern!r} is no regular expression: {error}", hint
            raise
        return bool(found) and text is not None


def _json(value: Any) -> str:
    """As JSON that SQLite reads: NaN and infinity are null, halves of surrogate pairs question marks."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def _value(value: Any) -> Any:
    """A value as SQLite takes it: lists and objects as JSON text, huge integers as floats."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value) if abs(value) < 2**1023 else None
    if isinstance(value, list | dict):
        return _json(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
