"""What commands print: results on stdout, everything else on stderr.

Results are JSON for scripts (`--json`) or a table for people. Progress bars are drawn on stderr, and only
on a terminal.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


def complain(message: str, hint: str | None = None, *, code: int) -> int:
    """Print an error as one line on stderr and return the exit code."""
    line = f"clipkit: error: {message}{f' ({hint})' if hint else ''}"
    sys.stderr.write(line.replace("\r", "").replace("\n", " ") + "\n")
    return code


def counted(number: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_json(value: Any) -> None:
    """Print one value as one line of JSON (UTF-8; NaN and infinity are refused)."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_table(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> None:
    """Print rows as an aligned table; numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 10_000  # nothing is folded in a file or a pipe
    Console(file=sys.stdout, width=width, highlight=False, markup=False).print(table)


class Task:
    """One running progress bar."""

    def __init__(self, progress: Progress, description: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, text="")

    def advance(self, amount: float = 1) -> None:
        """Move the bar on."""
        self._progress.advance(self._task, amount)

    def update(self, *, completed: float | None = None, total: float | None = None, text: str = "") -> None:
        """Set the bar's position or length, and the words after it."""
        self._progress.update(self._task, completed=completed, total=total, text=text)


class _Bars(Progress):
    """Bars with each one's words on a line below, so that both fit on a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["text"]:
                yield Text(f"  {task.fields['text']}", overflow="ellipsis", no_wrap=True)


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[Task]:
    """A progress bar on stderr; silent when stderr is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _Bars(*columns, console=console, disable=not console.is_terminal) as bar:
        yield Task(bar, description, total)
