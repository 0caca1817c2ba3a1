"""Lines of text files as a map: the sentence at any position, read by offset, by any process.

A corpus of millions of sentences needs no shards: each file is read through once, when it is opened, and of
each line only its offset is kept (8 bytes). A `.txt` holds a sentence a line. A `.tsv`, `.csv` or `.jsonl`
holds columns: `caption`, or else the first one, is the caption, and all of them are the sample's metadata, so
that `data.more_captions: [sent1, hard_neg]` finds them. What is in the samples is what `ShardDataset` has: a
file stands for a shard, and the sentence's line (of a `.csv`, its row) is its key.

Empty lines are left out and counted; a line that is not UTF-8 is a fault. Files are opened when first needed
and never travel to another process.
"""

import csv
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit_data.dataset import record_id
from clipkit_data.records import Record, RecordError, group_faults
from clipkit_data.shards.scan import Fault

log = logging.getLogger("clipkit_data")
LINE_SUFFIXES = (".txt", ".tsv", ".csv", ".jsonl")
NOT_UTF8 = "caption is not UTF-8"
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 24
_LONGEST = 1 << 24
"""Bytes that a line may have."""


@dataclass(frozen=True)
class _File:
    """What is kept of one file.

    Args:
        path: Where it is.
        bytes: Its size.
        sha256: Of its content, hex.
        starts: Byte offsets of its lines (the header's, too) and of its end, int64 (lines + 1,).
        before: For each line that is no sample, how many samples stand before it, int64, ascending.
        columns: The names of its columns; none in a `.txt`.
    """

    path: Path
    bytes: int
    sha256: str
    starts: np.ndarray
    before: np.ndarray
    columns: tuple[str, ...]

    @property
    def samples(self) -> int:
        return len(self.starts) - 1 - len(self.before)

    def line(self, index: int) -> int:
        """The number of the line of a sample, counted from 0."""
        return index + int(np.searchsorted(self.before, index, side="right"))


class LineDataset:
    """The sentences of several text files, by position; what else is asked of a `ShardDataset` is here too.

    Args:
        paths: Files with the suffixes `LINE_SUFFIXES`, in the order that numbers them.
        name: What to call the dataset in messages and manifests.

    Attributes:
        sizes: Sentences in each file, int64 (S,).
        empty: Lines without any text, over all files: left out.
        faults: Lines that are not UTF-8: left out.

    Raises:
        NotFoundError: A file does not exist.
        InputError: A file of another kind, or a header that names no columns.
        DataError: A file cannot be read, or no file holds a sentence.
    """

    remote = False
    has_captions = True

    def __init__(self, paths: Sequence[Path | str], name: str | None = None) -> None:
        self.paths = [str(path) for path in paths]
        self.name = name or ", ".join(self.paths)
        self.faults: list[Fault] = []
        self.empty = 0
        self._open_files: dict[int, int] = {}
        self._files = [self._scan(Path(path)) for path in self.paths]
        self.sizes = np.array([file.samples for file in self._files], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        if self.faults:
            first = self.faults[0]
            where = f"{first.shard}, line {first.sample} (byte {first.offset})"
            log.warning("%s: %d lines are not UTF-8, the first: %s", self.name, len(self.faults), where)
        if self.empty:
            log.info("%s: %d empty lines are left out", self.name, self.empty)
        if not len(self):
            raise DataError(f"{self.name}: no line holds a sentence")

    def _scan(self, path: Path) -> _File:
        """Read a file through once."""
        if path.suffix.lower() not in LINE_SUFFIXES:
            raise InputError(f"{path}: not a file of sentences", hint=f"known: {', '.join(LINE_SUFFIXES)}")
        columns, digest = (), hashlib.sha256()
        starts, left_out, size = [np.zeros(1, dtype=np.int64)], list[int](), 0
        try:
            with path.open("rb") as file:
                for text, ends in _pieces(path, iter(lambda: file.read(_CHUNK), b"")):
                    first = sum(len(part) for part in starts) - 1
                    digest.update(text)
                    lines = [text[start:end] for start, end in pairwise([0, *ends.tolist()])]
                    if first == 0:
                        columns = _columns(path, lines[0])
                    left_out += self._unsound(path, lines, first, size)
                    starts.append(size + ends)
                    size += len(text)
        except FileNotFoundError:
            raise NotFoundError(f"no such file: {path}") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        before = np.array(left_out, dtype=np.int64) - np.arange(len(left_out))
        return _File(path, size, digest.hexdigest(), np.concatenate(starts), before, columns)

    def _unsound(self, path: Path, lines: list[bytes], first: int, offset: int) -> list[int]:
        """The numbers of lines that are no sentences; `first` is the number of the first line given."""
        found, header = [], path.suffix.lower() in (".tsv", ".csv")
        for number, line in enumerate(lines, first):
            if number == 0 and header:
                found.append(number)
            else:
                try:
                    sound = bool(line.removeprefix(_BOM).decode().strip())
                    self.empty += not sound
                except UnicodeDecodeError as error:
                    place, sound = offset + len(line) - len(error.object) + error.start, False
                    self.faults.append(Fault(str(path), str(number + 1), place, NOT_UTF8))
                found += [] if sound else [number]
            offset += len(line)
        return found

    @property
    def shard_names(self) -> list[str]:
        """The files' names, in order."""
        return [file.path.name for file in self._files]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """The sample id at a position: (file, place among the file's sentences)."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        file = int(np.searchsorted(self._starts, position, side="right")) - 1
        return file, int(position - self._starts[file])

    def sample_id(self, position: int) -> int:
        """The sample id at a position as one int64."""
        return record_id(*self.locate(position))

    def key(self, position: int) -> str:
        """The number of the sentence's line, from 1."""
        number, index = self.locate(position)
        return str(self._files[number].line(index) + 1)

    def __getitem__(self, position: int) -> Record:
        """The record at a position: no picture, the sentence, and the columns as its metadata.

        Raises:
            RecordError: Its columns are not those of the header, its JSON is broken or has no text.
            DataError: The file cannot be read, or changed since it was opened.
        """
        id_ = self.locate(position)
        file = self._files[id_[0]]
        line = file.line(id_[1])
        start, end = file.starts[line : line + 2].tolist()
        data = os.pread(self._open(id_[0]), end - start, start)
        where = f"{file.path}, line {line + 1} (byte {start})"
        try:
            text = data.removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:  # it was sound when the file was opened
            raise DataError(f"{where}: the file changed after it was opened") from error
        caption, meta = _parse(text.rstrip("\r\n"), file, where)
        return Record(id_, str(line + 1), b"", caption, meta)

    def fingerprint(self) -> str:
        """SHA-256 over the files' names and contents."""
        content = [[file.path.name, file.sha256] for file in self._files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def manifest(self) -> list[dict[str, Any]]:
        """For each file `{"name", "bytes", "samples", "digest", "faults", "columns"}`."""
        faults = group_faults([fault.shard for fault in self.faults])
        return [
            {
                "name": file.path.name,
                "bytes": file.bytes,
                "samples": file.samples,
                "digest": file.sha256,
                "faults": faults.get(str(file.path), 0),
                "columns": list(file.columns),
            }
            for file in self._files
        ]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Nothing to fetch: the files are here."""

    def _open(self, number: int) -> int:
        """A file handle."""
        if number not in self._open_files:
            file = self._files[number]
            try:
                handle = os.open(file.path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{file.path}: cannot be opened: {error.strerror or error}") from error
            if os.fstat(handle).st_size != file.bytes:
                os.close(handle)
                raise DataError(f"{file.path}: the file changed after it was opened")
            self._open_files[number] = handle
        return self._open_files[number]

    def close(self) -> None:
        """Close the open files; they are opened again when needed."""
        while self._open_files:
            os.close(self._open_files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": {}}

    def __del__(self) -> None:
        if "_open_files" in self.__dict__:
            self.close()


def _pieces(path: Path, chunks: Iterator[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
    """A file in pieces that end where lines end, each with the places behind its lines, int64.

    In a `.csv` (RFC 4180) quoted line breaks end no row: a row ends where the quotes so far are even.
    """
    quoted, rest, offset = path.suffix.lower() == ".csv", b"", 0
    for chunk in chunks:
        piece = rest + chunk
        text = np.frombuffer(piece, dtype=np.uint8)
        ends = np.flatnonzero(text == ord("\n"))
        if quoted:
            ends = ends[np.cumsum(text == ord('"'), dtype=np.int64)[ends] % 2 == 0]
        end = int(ends[-1]) + 1 if len(ends) else 0
        rest = piece[end:]
        if len(rest) > _LONGEST:
            raise DataError(
                f"{path}: the line at byte {offset + end} is longer than {_LONGEST >> 20} MiB",
                hint="a .csv may have a quote that is never closed" if quoted else "put a sentence on a line",
            )
        if end:
            yield piece[:end], ends + 1
        offset += end
    if rest:
        yield rest, np.array([len(rest)])


def _columns(path: Path, line: bytes) -> tuple[str, ...]:
    """The names of a table's columns, from its first line. Raises: InputError."""
    if path.suffix.lower() == ".txt":
        return ()
    try:
        text = line.removeprefix(_BOM).decode().strip("\r\n")
        names = _object(text) if path.suffix.lower() == ".jsonl" else _fields(text, path)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: the first line names no columns: {error}") from error
    names = [name.strip() for name in names]
    if not all(names) or not names or len(set(names)) < len(names):
        raise InputError(
            f"{path}: the first line must name the columns, each once: {', '.join(names) or 'it is empty'}",
            hint="a file with a sentence on each line is a .txt",
        )
    return tuple(names)


def _object(text: str) -> dict[str, Any]:
    """A line of a `.jsonl`. Raises: ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, not {type(value).__name__}")
    return value


def _fields(text: str, path: Path) -> list[str]:
    """The fields of a row; in a `.tsv` quotes are characters like others, as in the GLUE files."""
    if path.suffix.lower() == ".tsv":
        return text.split("\t")
    return next(csv.reader([text], strict=True), [])


def _parse(text: str, file: _File, where: str) -> tuple[str, dict[str, Any]]:
    """The caption and the columns of a line. Raises: RecordError."""
    if not file.columns:
        return text.strip(), {}
    if file.path.suffix.lower() == ".jsonl":
        try:
            meta = _object(text)
        except ValueError as error:
            raise RecordError(f"{where}: {error}", "invalid json") from error
    else:
        try:
            fields = _fields(text, file.path)
        except csv.Error as error:
            raise RecordError(f"{where}: {error}", "invalid csv") from error
        if len(fields) != len(file.columns):
            wrong = f"{len(fields)} columns, expected {len(file.columns)}"
            raise RecordError(f"{where}: {wrong}", "wrong number of columns")
        meta = {name: field.strip() for name, field in zip(file.columns, fields, strict=True)}
    column = "caption" if "caption" in file.columns else file.columns[0]
    caption = meta.get(column)
    if not isinstance(caption, str):
        raise RecordError(f"{where}: the column {column!r} holds no text", "missing caption")
    return caption.strip(), meta
