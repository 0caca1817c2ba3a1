"""Whole shards from elsewhere, kept on this machine's disk for all its processes.

A copy is a tar beside a small `.json` with what the server said of it (size, ETag or date). It is written to
a temporary name, its size compared, fsynced and renamed, under a lock of its own: several processes that
want one shard download it once, and a killed download leaves nothing that can be taken for a shard.

What is followed and what is refused when a remote file changes: a process that opens a shard for the first
time takes the version that is there now, and a stale copy is replaced. From then on the shard does not
change for this process: another version, also one that another process downloaded, is a DataError, and so is
a size that is not the manifest's.

Where space is limited, the copies used longest ago are removed before a download begins, never one that is
being written or opened. A removed file that some process has open can still be read there, and takes its
place on the disk until it is closed: whoever keeps files open closes those soon (`ShardDataset`).
"""

import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from clipkit.errors import ConfigError, DataError
from clipkit_data.remote.copies import Copy, disk_faults, size_of
from clipkit_data.remote.storage import PIECE, Remote, RemoteFile, Retry, is_remote, shown, stat

log = logging.getLogger("clipkit_data")
_THREADS = 2
_WAITING = 16


def default_folder() -> Path:
    """Where copies lie: `$CLIPKIT_CACHE`, or `~/.cache/clipkit/shards`."""
    return Path(os.environ.get("CLIPKIT_CACHE") or "~/.cache/clipkit/shards").expanduser()


def _limit() -> int | None:
    """`$CLIPKIT_CACHE_BYTES`. Raises: ConfigError."""
    text = os.environ.get("CLIPKIT_CACHE_BYTES", "").strip()
    if text and not text.isdigit():
        raise ConfigError(f"CLIPKIT_CACHE_BYTES must be a number of bytes, got {text!r}")
    return int(text) if text else None


class _Process:
    """What belongs to one process: the versions it works with, and the threads that fetch ahead."""

    def __init__(self, owner: "ShardFiles") -> None:
        self.pid = os.getpid()
        self.seen: dict[str, Remote] = {}
        self.asked: set[str] = set()
        self.wanted: queue.Queue[str] = queue.Queue(_WAITING)
        self.owner = owner
        self.threads: list[threading.Thread] = []

    def ask(self, url: str) -> None:
        """Fetch a shard some time soon; forgotten when many are waiting, since it is but a hint."""
        if url in self.asked:
            return
        self.asked.add(url)
        try:
            self.wanted.put_nowait(url)
        except queue.Full:
            self.asked.discard(url)
            return
        if len(self.threads) < _THREADS:
            self.threads.append(threading.Thread(target=self._fetch, daemon=True, name="clipkit-prefetch"))
            self.threads[-1].start()

    def _fetch(self) -> None:
        while True:
            url = self.wanted.get()
            try:
                self.owner.local(url)
            except Exception as error:  # whoever needs the shard meets it again
                log.info("fetching ahead: %s", error)
            finally:
                self.asked.discard(url)


class ShardFiles:
    """Local paths of shards: the path itself, or that of a finished copy.

    Can be pickled and survives a fork: what was checked, locks and threads are each process's own.

    Args:
        folder: Where copies are kept; None takes `default_folder()`.
        limit_bytes: All copies together take no more than this; None takes `$CLIPKIT_CACHE_BYTES`, or no
            limit. Keep it above the shards that are read at one time, or they are downloaded again and again.
        retry: How transient faults are met.

    Raises:
        ConfigError: A limit below 1 byte.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        limit_bytes: int | None = None,
        *,
        retry: Retry | None = None,
    ) -> None:
        if limit_bytes is None:
            limit_bytes = _limit()
        if limit_bytes is not None and limit_bytes < 1:
            raise ConfigError(f"the limit of the shard cache must be above 0 bytes, got {limit_bytes}")
        self.folder = Path(folder).expanduser() if folder is not None else default_folder()
        self.limit_bytes, self.retry = limit_bytes, retry or Retry()
        self._process = _Process(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_process"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process = _Process(self)

    @property
    def _own(self) -> _Process:
        if self._process.pid != os.getpid():
            self._process = _Process(self)
        return self._process

    def path(self, url: str) -> Path:
        """Where the copy of a shard lies: a name for people, and a hash of the URL."""
        parts = urlsplit(shown(url)).path.removesuffix(".tar").split("/")
        name = re.sub(r"[^\w.-]+", "_", "-".join(part for part in parts[-2:] if part))[-80:].lstrip(".")
        return self.folder / f"{name or 'shard'}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"

    def local(self, shard: str | Path, size: int | None = None) -> Path:
        """A local path of a shard, downloaded first where there is no copy.

        Under a limit another process may remove the copy at any later time; `open` is safe from that.

        Args:
            shard: A path, which is returned as it is, or an URL.
            size: Bytes that the shard must have, from a manifest.

        Raises:
            NotFoundError: The server has no such file.
            DataError: It cannot be read, is not of that size, changed since this process first saw it, or
                the disk is full.
            ConfigError: The shard alone is larger than the cache may be.
        """
        if not is_remote(shard):
            return Path(shard)
        with self._held(str(shard), size) as tar:
            return tar

    def open(self, shard: str | Path, size: int | None = None) -> int:
        """A file descriptor of a shard, open for reading; arguments and errors as in `local`."""
        held = self._held(str(shard), size) if is_remote(shard) else nullcontext(Path(shard))
        with held as tar:
            try:
                return os.open(tar, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{tar}: cannot be opened: {error.strerror or error}") from error

    def prefetch(self, shards: Iterable[str | Path]) -> None:
        """Begin to download shards in the background, the first first; returns at once.

        A few downloads run and a few wait; beyond that shards are passed over. What goes wrong is raised by
        `local`, which tries again.
        """
        for shard in shards:
            if is_remote(shard):
                self._own.ask(str(shard))

    @contextmanager
    def _held(self, url: str, size: int | None) -> Iterator[Path]:
        """The finished copy of a shard, safe from being replaced or removed inside the block."""
        copy = Copy(self.path(url))
        with disk_faults(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = copy.lock()
            lock.acquire()
        try:
            self._provide(url, copy, size)
            yield copy.tar
        finally:
            lock.release()

    def _provide(self, url: str, copy: Copy, size: int | None) -> None:
        """Make sure, under the shard's lock, that the copy is there and is the right version."""
        name, seen, kept = shown(url), self._own.seen.get(url), copy.kept()
        if seen is None or kept is None:
            remote = stat(url, self.retry)
            if remote.size is None:
                remote = Remote(size, remote.tag)
            _check(name, remote, size, seen)
            if kept != remote:
                self._download(url, copy, remote)
            self._own.seen[url] = remote
        else:
            _check(name, kept, size, seen)
        with disk_faults(self.folder):
            os.utime(copy.note)  # used now

    def _download(self, url: str, copy: Copy, remote: Remote) -> None:
        """Make the copy, whole or not at all."""
        size = remote.size
        if size is None:
            raise DataError(
                f"{shown(url)}: the server does not say how many bytes the shard has",
                hint="a manifest.json, as `clipkit shards index` writes it, says so too",
            )
        with disk_faults(self.folder):
            copy.drop()
        try:
            while not self._reserve(copy, size):
                time.sleep(0.1)  # other downloads hold the room; they end
            self._fill(url, copy.part, size)
            after = stat(url, self.retry)
            if after.tag != remote.tag or after.size not in (size, None):
                raise DataError(f"{shown(url)}: it changed while it was copied", hint="start again")
            with disk_faults(self.folder):
                copy.finish(url, remote)
        finally:
            copy.part.unlink(missing_ok=True)

    def _fill(self, url: str, part: Path, size: int) -> None:
        """The bytes of the shard into a file of their size."""
        done = 0
        with RemoteFile(url, self.retry, size) as remote, part.open("r+b", buffering=0) as file:
            while piece := remote.read(PIECE):
                if done + len(piece) > size:
                    raise DataError(f"{shown(url)}: more than the {size} bytes that it should have")
                with disk_faults(self.folder):
                    rest = memoryview(piece)
                    while rest:  # a full disk takes a part first
                        rest = rest[file.write(rest) or 0 :]
                done += len(piece)
            with disk_faults(self.folder):
                os.fsync(file.fileno())

    def _reserve(self, copy: Copy, size: int) -> bool:
        """Make room for a download and claim it; False where others hold the room."""
        limit = self.limit_bytes
        if limit is not None and size > limit:
            raise ConfigError(
                f"a shard of {size} bytes does not fit a shard cache of {limit} bytes",
                hint="raise the limit, to several shards per process at least",
            )
        with disk_faults(self.folder), FileLock(self.folder / ".room.lock"):
            for part in self.folder.glob("*.part"):
                Copy(part.with_suffix("")).drop_unless_busy()  # of a download that was killed
            if limit is not None and not self._make_room(limit - size):
                return False
            copy.claim(size)
        return True

    def _make_room(self, limit: int) -> bool:
        """Remove the copies used longest ago until the others take no more than `limit` bytes."""
        copies = sorted(map(Copy, self.folder.glob("*.tar")), key=Copy.last_use)
        used = sum(map(size_of, [*self.folder.glob("*.tar"), *self.folder.glob("*.part")]))
        for copy in copies:
            if used <= limit:
                break
            size = size_of(copy.tar)
            used -= size if copy.drop_unless_busy() else 0
        return used <= limit


def _check(name: str, found: Remote, size: int | None, seen: Remote | None) -> None:
    """Raise a DataError when a shard is not the one that the manifest or this process knows."""
    if size is not None and found.size != size:
        raise DataError(
            f"{name}: it has {found.size} bytes, the manifest says {size}: it changed after it was indexed",
            hint="index the shards again, or put the old file back",
        )
    if seen is not None and found != seen:
        raise DataError(
            f"{name}: it changed while it was in use (was {seen.size} bytes, version {seen.tag}; "
            f"is {found.size} bytes, version {found.tag})",
            hint="shards must not be overwritten during a run; start again with the new ones",
        )
