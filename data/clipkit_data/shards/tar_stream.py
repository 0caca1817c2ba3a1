"""One shard read from front to back, from a file, a server or a command, with every loss reported.

webdataset (like Python's `tarfile`) takes a damaged header, or a connection that broke between two members,
for the end of a shard, and sees the exit status of a command only if it comes in time. Here a shard must end
with its end mark and only zeros after it, and a command must end with status 0; what is left out is said.
"""

import hashlib
import io
import itertools
import lzma
import os
import signal
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from clipkit.errors import ClipkitError, DataError
from clipkit_data.records import Record, RecordError
from clipkit_data.remote.storage import PIECE, RemoteFile, Retry, is_remote, shown
from clipkit_data.shards.sample import contents_of, to_record
from clipkit_data.shards.scan import split_name

_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)
_END_MARK: type[Exception] = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class StreamFault:
    """What was left out of a stream.

    Args:
        shard: The path, URL or command.
        index: How many sound samples of the shard came before.
        key: The sample's key; None when it concerns the rest of the shard.
        reason: One of a few fixed phrases.
        detail: The whole message.
    """

    shard: str
    index: int
    key: str | None
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class StreamSample:
    """A sample of a stream: its record, its shard, and its place among the shard's sound samples."""

    record: Record
    shard: str
    index: int


def stream_id(shard: str, key: str) -> int:
    """The id of a sample whose place is not known: 63 bits of a hash of shard and key."""
    name = f"{shard}\0{key}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1


def read_shard(
    shard: str, report: Callable[[StreamFault], Any], retry: Retry
) -> Generator[StreamSample, None, None]:
    """The samples of one shard, in order.

    Args:
        shard: A path, an URL, or `pipe:COMMAND`.
        report: Called with each thing that is left out; a shard that cannot be read, or not to its end, is
            such a thing.
        retry: How transient faults of a server are met.
    """
    name, taken = shown(shard), 0
    try:
        with _opened(shard, retry) as stream:
            for key, members in itertools.groupby(_named(stream), lambda member: member[0]):
                try:
                    record = _record(key, [(extension, data) for _, extension, data in members], name)
                except RecordError as error:
                    report(StreamFault(name, taken, key, error.reason, error.message))
                    continue
                yield StreamSample(record, name, taken)
                taken += 1
    except _DAMAGE as error:
        detail = f"{name}: after {taken} sound samples: {error}"
        report(StreamFault(name, taken, None, "shard cut or damaged", detail))
    except ClipkitError as error:
        detail = f"{name}: after {taken} sound samples: {error.message}"
        report(StreamFault(name, taken, None, "shard cannot be read", detail))


def _record(key: str, members: list[tuple[str, bytes]], shard: str) -> Record:
    """A sample's members as a record. Raises: RecordError."""
    where, found = f"{shard}: {key}", dict(members)
    if len(found) < len(members):
        raise RecordError(f"{where}: a member comes twice", "duplicate member")
    contents = contents_of(found)
    if len(contents) > 1 or not (contents or "txt" in found):
        reason = "several pictures" if contents else "missing picture"
        raise RecordError(f"{where}: {reason}: it has {', '.join(found)}", reason)
    return to_record((0, 0), key, found, where)


def _named(stream: IO[bytes]) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and data of each member; those whose names are no KEY.EXTENSION belong to nothing."""
    for name, data in _members(stream):
        parts = split_name(name)
        if parts is not None:
            yield *parts, data


class _Header(tarfile.TarInfo):
    """A header that `tarfile` cannot take for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":  # pyright: ignore[reportIncompatibleMethodOverride]
        """The next header. Raises: tarfile.ReadError where the archive ends without its mark."""
        try:
            return super().fromtarfile(tar)
        except _END_MARK:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut or damaged at byte {tar.offset}: {error}") from error


def _members(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Names and data of a tar, which may be compressed. Raises: tarfile.ReadError unless it is whole."""
    with tarfile.open(fileobj=stream, mode="r|*", bufsize=_BLOCK, tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (else all headers are kept)
            if member.isreg():
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()
        rest: Any = tar.fileobj
        while block := rest.read(_BLOCK):  # to its very end: a command whose output is not read fails
            if block.count(0) != len(block):
                raise tarfile.ReadError("data after the end mark: a zeroed header, or several tars in one")


@contextmanager
def _opened(shard: str, retry: Retry) -> Iterator[IO[bytes]]:
    """The bytes of a path, an URL or a command from the beginning."""
    if shard.startswith("pipe:"):
        with _command(shard.removeprefix("pipe:")) as stream:
            yield stream
    elif is_remote(shard):
        with io.BufferedReader(RemoteFile(shard, retry), PIECE) as stream:
            yield stream
    else:
        with open(shard, "rb") as stream:
            yield stream


@contextmanager
def _command(command: str) -> Iterator[IO[bytes]]:
    """What a shell command writes. Raises: DataError, after the block, when the command fails."""
    # a session of its own, so that all of `a | b` can be ended and not the shell alone
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)
    output = process.stdout
    assert output is not None
    try:
        try:
            yield output
        except _DAMAGE:
            if output.read(1) or not process.wait():  # the fault is in what it wrote
                raise
        output.close()
        if process.wait():
            raise DataError(f"the command ended with status {process.returncode}")
    finally:
        output.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
