"""An index folder on disk: immutable snapshots, and a CURRENT file that names the one in force.

    INDEX/CURRENT                     the name of a snapshot, replaced by atomic rename
    INDEX/snapshots/000001/           written whole under a temporary name, then renamed; never changed
    INDEX/.lock                       held by the one process that writes

A reader follows CURRENT; it needs no lock, because what CURRENT names is complete and does not change. A
writer holds the lock, makes the next snapshot, and switches CURRENT. Killed at any moment it leaves the old
index or the new one; what it left half-made is not named by CURRENT, is ignored, and is removed by the next
writer. The last two snapshots are kept, so that a reader that has just read CURRENT finds its files.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipkit.errors import ArtifactError, NotFoundError
from clipkit.files import MANIFEST, atomic_folder, atomic_write, fsync_path

CURRENT = "CURRENT"
SNAPSHOTS = "snapshots"
LOCK = ".lock"
KEEP = 2
_NAME = re.compile(r"\d{6,}")


def current_name(root: Path) -> str:
    """The name of the snapshot in force.

    Raises:
        NotFoundError: No such folder.
        ArtifactError: The folder is no index, or its first build never finished.
    """
    if not root.is_dir():
        raise NotFoundError(f"no such index: {root}", hint="make one with: clipkit index build")
    try:
        name = (root / CURRENT).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        raise _not_an_index(root) from None
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"{root / CURRENT} names no snapshot: {name[:40]!r}", hint="build the index again"
        )
    return name


def _not_an_index(root: Path) -> ArtifactError:
    if (root / SNAPSHOTS).is_dir():
        return ArtifactError(
            f"{root} is an index whose first build did not finish: it has no {CURRENT}", hint="build it again"
        )
    if (root / MANIFEST).is_file() and root.parent.name == SNAPSHOTS:
        return ArtifactError(f"{root} is one snapshot of an index", hint=f"open {root.parent.parent}")
    what = "an artifact of another kind" if (root / MANIFEST).is_file() else "no index folder"
    return ArtifactError(f"{root} is {what}: it has no {CURRENT}", hint="make one with: clipkit index build")


def check_target(root: Path) -> None:
    """Refuse to build in a folder that holds something other than an index. Raises: ArtifactError."""
    if root.exists() and not root.is_dir():
        raise ArtifactError(f"{root} exists and is no folder", hint="choose another folder")
    if root.is_dir():
        foreign = [x.name for x in root.iterdir() if x.name not in (CURRENT, SNAPSHOTS) and x.name[0] != "."]
        if foreign:
            raise ArtifactError(
                f"{root} holds other things than an index: {', '.join(sorted(foreign)[:3])}",
                hint="choose another folder",
            )


@contextmanager
def writing(root: Path, *, timeout: float = 60.0) -> Iterator[None]:
    """Hold the writer's lock of an index folder, making the folder if need be, and clear what a crash left.

    The lock belongs to an open file, so it also keeps threads of one process apart, and the system drops it
    when its holder dies.

    Args:
        root: The index folder.
        timeout: Seconds to wait for another writer.

    Raises:
        ArtifactError: Another writer held the lock for the whole time.
    """
    (root / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
    fsync_path(root.parent)
    handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + timeout
        while not _try_lock(handle):
            if time.monotonic() > deadline:
                raise ArtifactError(f"another process is writing to {root}", hint="wait until it is done")
            time.sleep(0.02)
        _tidy(root)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def publish(root: Path, write: Callable[[Path], None]) -> str:
    """Make the next snapshot and switch to it; the caller holds the lock.

    Args:
        root: The index folder.
        write: Fills an empty folder with a complete snapshot.

    Returns:
        The new snapshot's name.
    """
    names = _names(root)
    name = f"{int(names[-1]) + 1 if names else 1:06d}"
    with atomic_folder(root / SNAPSHOTS / name) as folder:
        write(folder)
    atomic_write(root / CURRENT, name + "\n")
    for old in [*names, name][:-KEEP]:
        shutil.rmtree(root / SNAPSHOTS / old)
    return name


def _names(root: Path) -> list[str]:
    names = [item.name for item in (root / SNAPSHOTS).iterdir() if _NAME.fullmatch(item.name)]
    return sorted(names, key=int)


def _tidy(root: Path) -> None:
    """Remove temporary files, and snapshots that were finished but never came into force."""
    for item in [*root.glob(f".{CURRENT}.*"), *(root / SNAPSHOTS).glob(".*")]:
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    try:
        newest = int(current_name(root)) if (root / CURRENT).is_file() else 0
    except ArtifactError:
        return  # CURRENT is damaged: any snapshot may have been in force
    for name in _names(root):
        if int(name) > newest:
            shutil.rmtree(root / SNAPSHOTS / name)
