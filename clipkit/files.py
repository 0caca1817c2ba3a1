"""Files that are there whole or not at all, and manifests that say what a folder holds.

Everything is written to a temporary name beside its target, fsynced, renamed, and the directory fsynced.
Each artifact folder carries a `clipkit.json` manifest that names its kind, where it came from, and the
SHA-256 of every file in it; opening an artifact checks them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipkit.errors import ArtifactError, NotFoundError

MANIFEST = "clipkit.json"
FORMAT = 1


def fsync_path(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: The folder to make.
        overwrite: Replace an existing folder; without it an existing non-empty one is refused.

    Raises:
        ArtifactError: `path` exists and `overwrite` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} already exists", hint="choose another folder or remove this one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for item in (*temporary.rglob("*"), temporary):
            fsync_path(item)
        os.chmod(temporary, 0o755)
        if path.exists():
            retired = temporary.with_name(temporary.name + ".old")
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, kind: str, **fields: Any) -> dict[str, Any]:
    """Write `folder/clipkit.json`: kind, format, time, `fields`, and the SHA-256 of every other file."""
    from clipkit import __version__

    files = {
        item.relative_to(folder).as_posix(): sha256_file(item)
        for item in sorted(folder.rglob("*"))
        if item.is_file() and item.name != MANIFEST
    }
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "clipkit": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
        "files": files,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def model_folder(name: Path | str) -> Path:
    """The model folder meant: the one of that name, or `model` in a run folder of that name."""
    inner = Path(name) / "model"
    return inner if (inner / MANIFEST).is_file() and not (Path(name) / MANIFEST).is_file() else Path(name)


def read_manifest(folder: Path | str, kind: str, *, verify: bool = True) -> dict[str, Any]:
    """The manifest of an artifact folder.

    Args:
        folder: A model, embeddings, index-snapshot or run folder.
        kind: The kind it must be.
        verify: Also compare the SHA-256 of every file that the manifest names.

    Raises:
        NotFoundError: No such folder.
        ArtifactError: No manifest, another kind, a newer format, or a file that is missing or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(f"no such folder: {folder}")
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is no {kind} folder: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, version, files = manifest["kind"], int(manifest["format"]), dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a clipkit manifest: {error}") from error
    if found != kind:
        raise ArtifactError(f"{folder} is of kind {found!r}, not {kind!r}")
    if version > FORMAT:
        raise ArtifactError(
            f"{path}: format {version} is newer than this clipkit reads ({FORMAT})", hint="upgrade clipkit"
        )
    if verify:
        for name, digest in files.items():
            item = folder / name
            if not item.is_file():
                raise ArtifactError(f"{item} is missing", hint="make the artifact again")
            if sha256_file(item) != digest:
                raise ArtifactError(
                    f"{item} is not the file that {MANIFEST} names (SHA-256 differs)",
                    hint="it was changed or damaged after it was written: make the artifact again",
                )
    return manifest
