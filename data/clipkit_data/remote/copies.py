"""One copy of a remote shard in the cache folder: its files, and what they say.

A copy is whole when its tar and its note are there and agree on the size; everything else (a part, a tar
without a note) counts for nothing. The note keeps what the server said; its time is when the copy was last
used. The lock file stays behind when a copy goes: removing it would part processes that wait for it.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from clipkit.errors import DataError
from clipkit.files import atomic_write, fsync_path
from clipkit_data.remote.storage import Remote, shown

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn faults of the local disk into a DataError."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        full = error.errno in _FULL
        raise DataError(
            f"shard cache {folder}: {'the disk is full' if full else 'no access'}: {error.strerror or error}",
            hint="free space, lower CLIPKIT_CACHE_BYTES, or name another folder in CLIPKIT_CACHE",
        ) from error


@dataclass(frozen=True, slots=True)
class Copy:
    """The files of one copy; `tar` is its path."""

    tar: Path

    @property
    def note(self) -> Path:
        """What the server said of the shard, as JSON."""
        return self.tar.with_name(f"{self.tar.name}.json")

    @property
    def part(self) -> Path:
        """A download that is not finished; as large as the shard from the start, which claims the room."""
        return self.tar.with_name(f"{self.tar.name}.part")

    def lock(self, *, wait: bool = True) -> FileLock:
        """Held by whoever makes, opens or removes the copy."""
        return FileLock(self.tar.with_name(f".{self.tar.name}.lock"), blocking=wait)

    def kept(self) -> Remote | None:
        """The version of a whole copy; None where there is none."""
        try:
            note = json.loads(self.note.read_bytes())
            remote = Remote(note["size"], note["tag"])
            return remote if self.tar.stat().st_size == remote.size else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def last_use(self) -> float:
        """When the copy was last asked for, seconds; 0 without a note."""
        try:
            return self.note.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def claim(self, size: int) -> None:
        """Begin a download."""
        with self.part.open("wb") as file:
            file.truncate(size)

    def finish(self, url: str, remote: Remote) -> None:
        """Turn the finished part into the copy."""
        os.replace(self.part, self.tar)
        fsync_path(self.tar.parent)
        note = {"url": shown(url), "size": remote.size, "tag": remote.tag}
        atomic_write(self.note, json.dumps(note) + "\n")

    def drop(self) -> None:
        """Remove the copy; the note first, for an old note must never lie beside new bytes."""
        self.note.unlink(missing_ok=True)
        self.tar.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def drop_unless_busy(self) -> bool:
        """Remove the copy unless somebody holds its lock; whether it is gone."""
        try:
            with self.lock(wait=False):
                self.drop()
        except Timeout:
            return False
        return True


def size_of(file: Path) -> int:
    """Bytes in a file; 0 when it is just gone."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
