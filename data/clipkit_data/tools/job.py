"""A folder of shards in the making: begun under a hidden name, continued after a kill, renamed when whole.

`OUT` is written as `.OUT.partial` beside it. Each shard is one piece of work that depends on nothing but its
number, so that processes can share them; its marker is written last, and a shard with a marker is not made
again. What the folder was begun with is in its `.job/job.json`: the same command continues it, another one is
refused. At the end come the index files and the manifest, and the folder gets its name.
"""

import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from clipkit import __version__
from clipkit.errors import ArtifactError, ClipkitError, ConfigError, DataError, MismatchError
from clipkit.files import atomic_write, fsync_path
from clipkit_data.batches.lost_workers import explaining_lost_workers

K = TypeVar("K")
T = TypeVar("T")
Advance = Callable[[int], Any]
MakeShard = Callable[[Path, int, Advance | None], dict[str, Any]]
"""`make(folder, number, advance)` writes shard `number` and returns a report: JSON with its `rows`."""
_BLOCK = 512


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_or_cores(jobs: int | None) -> int:
    """The number of processes that was asked for, or one per core. Raises: ConfigError below 1."""
    if jobs is not None and jobs < 1:
        raise ConfigError(f"processes (jobs) must be at least 1, got {jobs}")
    return jobs or cores()


@dataclass(frozen=True)
class Job:
    """A folder of shards that is being made.

    Args:
        folder: Where the shards are written until all are there.
        notes: A folder inside it for what only the making needs; it is removed at the end.
    """

    folder: Path
    notes: Path

    @explaining_lost_workers()
    def run(
        self, make: MakeShard, count: int, *, jobs: int = 1, advance: Advance | None = None
    ) -> list[dict[str, Any]]:
        """Make the shards that are not there yet.

        Args:
            make: Writes one shard; see `MakeShard`.
            count: Number of shards.
            jobs: Most processes.
            advance: Called with the number of rows just done.

        Returns:
            The report of each shard, in order, whenever it was made.

        Raises:
            DataError: A shard cannot be made, or a process was killed.
        """
        reports = {number: report for number in range(count) if (report := self._done(number)) is not None}
        missing = [number for number in range(count) if number not in reports]
        if advance:
            advance(sum(report["rows"] for report in reports.values()))
        alone = min(jobs, len(missing)) <= 1
        piece = _Piece(self, make, advance if alone else None)
        with closing(each(piece, missing, jobs)) as made:  # no process goes on when this one is interrupted
            for number, report in zip(missing, made, strict=True):
                reports[number] = report
                if advance and not alone:
                    advance(report["rows"])
        return [reports[number] for number in range(count)]

    def marker(self, number: int) -> Path:
        """The file that says that a shard is done, and holds its report."""
        return self.notes / f"shard_{number}.json"

    def _done(self, number: int) -> dict[str, Any] | None:
        path = self.marker(number)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def bare(self) -> bool:
        """Whether nothing is done yet that another attempt could use."""
        return not {path.name for path in self.notes.iterdir()} - {"job.json", "lock"}

    def discard(self) -> None:
        """Remove what was made: it will never become a folder of shards."""
        shutil.rmtree(self.folder)


@dataclass(frozen=True)
class _Piece:
    """One shard and then its marker: what a process runs."""

    job: Job
    make: MakeShard
    advance: Advance | None

    def __call__(self, number: int) -> dict[str, Any]:
        report = self.make(self.job.folder, number, self.advance)
        atomic_write(self.job.marker(number), json.dumps(report))
        return report


def each(work: Callable[[K], T], keys: Sequence[K], jobs: int) -> Generator[T, None, None]:
    """`work(key)` for each key, in order, by at most `jobs` processes. Raises: DataError in their place."""
    if min(jobs, len(keys)) <= 1:
        yield from map(work, keys)
        return
    from clipkit_data.batches.workers import in_workers

    yield from in_workers(_Travelling(work), keys, workers=min(jobs, len(keys)))


@dataclass(frozen=True)
class _Travelling:
    """Work whose errors come back from another process as the one kind that `in_workers` hands on."""

    work: Callable[[Any], Any]

    def __call__(self, key: Any) -> Any:
        try:
            return self.work(key)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise DataError(f"{where}{error.strerror or error}") from error
        except ClipkitError as error:
            raise DataError(error.message, error.hint) from error


def each_block(work: Callable[[tuple[int, int]], T], rows: int, jobs: int) -> Iterator[T]:
    """`work((start, stop))` for consecutive blocks of rows, as `each`."""
    spans = [(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK)]
    return each(work, spans, jobs)


@contextmanager
def shards_job(out: str | Path, settings: dict[str, Any]) -> Iterator[Job]:
    """Begin or continue a folder of shards; when the block ends well, index it and give it its name.

    A block that fails leaves what is done for the next attempt, unless it called `Job.discard`.

    Args:
        out: The folder to make, or a link to it; it must not hold anything yet.
        settings: All that decides what is in the shards, as plain JSON.

    Raises:
        ArtifactError: `out` holds something already, is a mount point, or another process is making it.
        MismatchError: It was begun with other settings.
    """
    out = Path(os.path.realpath(out))
    if os.path.ismount(out):  # no folder can be renamed to it
        raise ArtifactError(f"{out} is a mount point", hint="name a folder inside it")
    if out.is_symlink():
        raise ArtifactError(
            f"{out} is a link that leads in a circle", hint="remove it or name another folder"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"{out} already exists", hint="choose another folder or remove this one")
    job = Job(out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.partial") / ".job")
    job.notes.mkdir(parents=True, exist_ok=True)
    lock = FileLock(job.notes / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ArtifactError(f"{out} is being made by another process", hint="wait for it to end") from error
    try:
        _begin(job, settings)
        yield job
        _finish(job, out)
    except BaseException:
        if job.notes.exists() and job.bare:
            job.discard()
        raise
    finally:
        lock.release()


def _begin(job: Job, settings: dict[str, Any]) -> None:
    """Note what the folder is made from, or compare it with what it was begun with."""
    wanted = json.loads(json.dumps({**settings, "clipkit": __version__}))
    path = job.notes / "job.json"
    for folder in (job.folder, job.notes):
        for leftover in folder.glob(".*"):  # temporary files of a process that was killed
            if leftover.is_file():
                leftover.unlink()
    if job.bare:
        for file in job.folder.glob("*.*"):  # of a shard that was not finished
            if file.is_file():
                file.unlink()
        atomic_write(path, json.dumps(wanted, indent=2) + "\n")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    other = [name for name in begun | wanted if begun.get(name) != wanted.get(name)]
    if other:
        raise MismatchError(
            f"{job.folder} was begun with another {' and '.join(other).replace('_', ' ')}",
            hint="give the settings of the first attempt to continue, or remove that folder",
        )


def _finish(job: Job, out: Path) -> None:
    """Index the shards and rename the folder; only then are the notes removed."""
    from clipkit_data.tools.indexing import index_shards

    index_shards(job.folder)
    fsync_path(job.folder)
    os.replace(job.folder, out)
    fsync_path(out.parent)
    shutil.rmtree(out / ".job")
