"""Files that lie elsewhere: whatever fsspec opens (s3, gs, https, hdfs, …), listed, asked for and read.

Every question is asked with patience (`clipkit_data.remote.retry`), and a long file whose connection is
lost is taken up where it broke. Credentials and endpoints are the drivers' own, from their environment and
fsspec's configuration; what an URL carries after `?` is never shown, since signatures stand there.
"""

import contextlib
import io
import json
import logging
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from clipkit.errors import ArtifactError, DataError, InputError, NotFoundError
from clipkit_data.remote.retry import AccessError, Retry, is_http, is_remote, shown, words

__all__ = ["RemoteFile", "Retry", "is_http", "is_remote", "list_shards", "read_bytes", "shown", "stat"]

log = logging.getLogger("clipkit_data")
PIECE = 1 << 24  # bytes of one request where a driver reads by ranges
MANIFEST = "manifest.json"
# Where drivers tell one version of a file from the next, the surest first.
_TAGS = ("ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "Last-Modified", "LastModified")
_TIMES = ("last_modified", "updated", "mtime", "modified", "created")


def _filesystem(url: str, timeout: float) -> tuple[Any, str]:
    """fsspec's file system of an URL and the path in it."""
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if is_http(url):
        import aiohttp

        scheme = url.partition("://")[0].lower()
        options["client_kwargs"] = {
            # aiohttp's own limit is five minutes for a whole file.
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout),
            "trust_env": True,
            "read_bufsize": 1 << 20,
            **conf.get(scheme, {}).get("client_kwargs", {}),
        }
    return url_to_fs(url, **options)


@dataclass(frozen=True, slots=True)
class Remote:
    """What a server says of a file: how many bytes, and a tag that changes with them; None: not known."""

    size: int | None
    tag: str | None


def stat(url: str, retry: Retry | None = None) -> Remote:
    """What a server says of a file now. Raises: NotFoundError; DataError."""
    retry = retry or Retry()

    def ask() -> Remote:
        files, path = _filesystem(url, retry.timeout)
        files.invalidate_cache()  # else the answer may be an hour old
        info = files.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError(f"{path} is a folder")
        tags = [str(info[name]) for name in _TAGS + _TIMES if info.get(name) is not None]
        return Remote(info.get("size"), next((tag for tag in tags if not tag.startswith("W/")), None))

    return retry.call(ask, url)


def read_bytes(url_or_path: str | Path, retry: Retry | None = None) -> bytes | None:
    """The bytes of a small file, None when there is none.

    Stores that may not be listed refuse access to a file that is not there: that is None too, with a warning.

    Raises:
        DataError: It is there (or may be), but cannot be read.
    """
    if not is_remote(url_or_path):
        try:
            return Path(url_or_path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DataError(f"{url_or_path}: cannot be read: {error.strerror or error}") from error
    url, retry = str(url_or_path), retry or Retry()

    def read() -> bytes:
        files, path = _filesystem(url, retry.timeout)
        return files.cat_file(path)

    try:
        return retry.call(read, url)
    except NotFoundError:
        return None
    except AccessError as error:
        log.warning("%s; taken as not there", error.message)
        return None


def list_shards(url: str, retry: Retry | None = None) -> list[str]:
    """The shards of a folder or pattern, as URLs by name.

    HTTP has no folders: there the names come from the `manifest.json` in the folder.

    Args:
        url: A folder (its `*.tar`), or a pattern with `*`.
        retry: How transient faults are met.

    Raises:
        NotFoundError: No shard is there.
        InputError: The server cannot list, and no manifest is there.
    """
    retry = retry or Retry()
    pattern = url if "*" in url else f"{url.rstrip('/')}/*.tar"
    found = _manifest_names(pattern, retry) if is_http(url) else _glob(pattern, retry)
    if not found:
        raise NotFoundError(f"no shards in {shown(url)}", hint="a shard is a .tar file")
    return sorted(found)


def _glob(pattern: str, retry: Retry) -> list[str]:
    """The files of a pattern, each beginning as the pattern begins."""
    root = pattern[: pattern.index("*")].rpartition("/")[0]

    def look() -> list[str]:
        files, path = _filesystem(pattern, retry.timeout)
        files.invalidate_cache()
        try:
            found = files.glob(path, detail=True)
        except NotImplementedError as error:
            raise _cannot_list(pattern) from error
        strip = len(files._strip_protocol(root))
        return [root + name[strip:] for name, info in found.items() if info["type"] == "file"]

    return retry.call(look, pattern)


def _cannot_list(pattern: str) -> InputError:
    folder = shown(pattern).rpartition("/")[0]
    return InputError(
        f"{folder}: this server cannot list its files, and there is no {MANIFEST}",
        hint=f"name the shards, as in {folder}/{{00000..00099}}.tar, "
        f"or put the {MANIFEST} there that `clipkit shards index` writes",
    )


def _manifest_names(pattern: str, retry: Retry) -> list[str]:
    """The shards of a folder that its manifest names."""
    folder, _, wanted = pattern.rpartition("/")
    data = None if "*" in folder else read_bytes(f"{folder}/{MANIFEST}", retry)
    if data is None:
        raise _cannot_list(pattern)
    try:
        names = [shard["name"] for shard in json.loads(data)["shards"]]
        if not all(isinstance(name, str) and name and "/" not in name for name in names):
            raise ValueError("a shard's name is no file name")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{shown(folder)}/{MANIFEST}: not a manifest of shards: {words(error)}",
            hint="write it anew with `clipkit shards index`",
        ) from error
    return [f"{folder}/{name}" for name in names if fnmatch(name, wanted)]


class _Answer:
    """One HTTP answer, read to its end: fsspec's own leaves the connection open when the status is bad.

    Args:
        files: fsspec's HTTP file system.
        url: The file.
        place: The first byte to ask for; servers without ranges begin at 0 all the same.
    """

    def __init__(self, files: Any, url: str, place: int) -> None:
        from fsspec.asyn import sync

        options = {**files.kwargs}
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if place:
            headers["Range"] = f"bytes={place}-"

        async def ask() -> Any:
            session = await files.set_session()
            answer = await session.get(files.encode_url(url), headers=headers, **options)
            answer.raise_for_status()  # lets the connection go
            return answer

        self._sync, self._loop = sync, files.loop
        self._answer: Any = sync(files.loop, ask)
        span = self._answer.headers.get("Content-Range", "")
        self._place = place if self._answer.status == 206 and span.startswith(f"bytes {place}-") else 0

    def read(self, size: int) -> bytes:
        """Some bytes, at most `size`; none at the end."""
        data: Any = self._sync(self._loop, self._answer.content.read, size)
        self._place += len(data)
        return data

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def close(self) -> None:
        """Let the connection go, soon: waiting for it might never end when the program does."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the connection with it
            self._loop.call_soon_threadsafe(self._answer.close)


class RemoteFile(io.RawIOBase):
    """A remote file, read once from its beginning to its end; a lost connection is taken up where it broke.

    Args:
        url: The file.
        retry: How transient faults are met; the tries are counted anew after each piece that arrives.
        size: Bytes in the file, where known: ending earlier is a fault.

    Raises:
        NotFoundError: Nothing is there (when first read).
        DataError: It cannot be read to its end.
    """

    def __init__(self, url: str, retry: Retry | None = None, size: int | None = None) -> None:
        self._url, self._retry, self._size = url, retry or Retry(), size
        self._file: Any = None
        self._place = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or a part of it; 0 at the end."""
        piece = self._retry.call(lambda: self._read(len(buffer)), self._url)
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
                self._pass_over(self._file)
            piece = self._file.read(min(size, PIECE))
            if not piece and self._size is not None and self._place < self._size:
                raise EOFError(f"the file ended after {self._place} of {self._size} bytes")
        except BaseException:
            self._drop()
            raise
        return piece

    def _open(self) -> Any:
        """The file, at the place that was reached."""
        files, path = _filesystem(self._url, self._retry.timeout)
        if not is_http(self._url):
            file = files.open(path, "rb", block_size=PIECE, cache_type="none")
            file.seek(self._place)
            return file
        return _Answer(files, path, self._place)

    def _pass_over(self, file: Any) -> None:
        """Read up to the place that was reached, where a server sends all from the beginning."""
        here = file.tell()
        while here < self._place:
            passed = len(file.read(min(self._place - here, PIECE)))
            if not passed:
                raise EOFError(f"the file ended before byte {self._place}")
            here += passed

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        """Let the connection go."""
        self._drop()
        super().close()
