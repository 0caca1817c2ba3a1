"""The index: vectors with their items in a folder, searched by similarity and changed without a gap.

`Index` is a handle on such a folder. It holds one immutable `Snapshot` in memory; `add` and `delete` write
the next snapshot, switch the folder's CURRENT to it, and move the handle. Readers are never blocked and
never see half a change. `layout` holds the rules on disk, `build_index` makes an index of embeddings.

    index = Index.open("demo/index")
    similarities, ids = index.search(embedder.texts(["a red balloon"]), k=10)
    items = index.items(ids[0])

n: queries or items, D: dimension, k: results per query.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from clipkit.errors import ArtifactError, InputError, MismatchError, NotFoundError
from clipkit.files import MANIFEST, sha256_file, write_manifest
from clipkit.index import layout
from clipkit.index.build import build_index
from clipkit.index.items import ITEMS, METADATA, edit_items, edit_metadata, item_rows
from clipkit.index.snapshot import MAX_K, Snapshot, check_ids, check_k, listed, unit_vectors, write_vectors

__all__ = ["MAX_K", "Index", "Snapshot", "build_index", "check_k"]


class HasFingerprint(Protocol):
    """A model, as far as an index cares."""

    @property
    def fingerprint(self) -> str: ...


class Index:
    """A handle on an index folder; threads may share it. Made by `Index.open`."""

    def __init__(self, path: Path, snapshot: Snapshot) -> None:
        self.path = path
        self._snapshot = snapshot

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> "Index":
        """Open the snapshot that is in force.

        Args:
            path: The index folder.
            verify: Compare every file's SHA-256 with the manifest before anything reads it.

        Raises:
            NotFoundError: No such folder.
            ArtifactError: The folder is no index, or a file is missing or damaged.
            DependencyError: faiss is not installed.
        """
        root = Path(path)
        return cls(root, _load(root, verify))

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the snapshot's files; searching still works, looking up items does not."""
        self._snapshot.items.close()

    @property
    def current(self) -> Snapshot:
        """The snapshot in memory. Keep it to look up what a search found while others change the index."""
        return self._snapshot

    @property
    def manifest(self) -> dict[str, Any]:
        """The snapshot's manifest."""
        return self._snapshot.manifest

    @property
    def dim(self) -> int:
        """D."""
        return self._snapshot.dim

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64: every id, read-only."""
        return self._snapshot.ids

    @property
    def model_fingerprint(self) -> str:
        """The fingerprint of the model whose embeddings these are."""
        return self.manifest["model"]["fingerprint"]

    def __len__(self) -> int:
        return len(self._snapshot)

    def check_model(self, model: HasFingerprint) -> None:
        """Refuse a model other than the one that made the vectors. Raises: MismatchError."""
        if model.fingerprint != self.model_fingerprint:
            name = self.manifest["model"].get("name", "another model")
            raise MismatchError(
                f"the index {self.path} was made with {name} (fingerprint {self.model_fingerprint[:12]}), "
                f"not with this model (fingerprint {model.fingerprint[:12]})",
                hint="use that model, or embed and index again with this one",
            )

    def search(self, vectors: ArrayLike, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
        """The `k` most similar items to each query, most similar first; equal ones by ascending id.

        similarity = (q / |q|) · (v / |v|)

        Args:
            vectors: (n, D) real numbers, finite, no zero vector.
            k: 1 to `MAX_K`.

        Returns:
            similarities (n, k) float32 and ids (n, k) int64. Where an index has fewer than k items the
            rest is -inf and -1.

        Raises:
            InputError: `vectors` or `k` is not as described.
        """
        return self._snapshot.search(vectors, k)

    def items(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        """The metadata of some items, in the order of `ids`. Raises: NotFoundError."""
        return self._snapshot.items.metadata(ids)

    def thumbnail(self, id: int) -> bytes | None:
        """An item's small picture (WebP, PNG or JPEG), or None when it has none. Raises: NotFoundError."""
        return self._snapshot.items.thumbnail(id)

    def vectors(self, ids: ArrayLike) -> np.ndarray:
        """(n, D) float32: the stored vectors, of length 1. Raises: NotFoundError."""
        return self._snapshot.vectors(ids)

    def refresh(self) -> bool:
        """Move to the snapshot that another process put in force; whether there was one."""
        name = layout.current_name(self.path)
        manifest = self.path / layout.SNAPSHOTS / name / MANIFEST
        # The digest tells an index that was removed and built anew, where the names start again.
        if manifest.is_file() and sha256_file(manifest) == self._snapshot.digest:
            return False
        self._snapshot = _load(self.path, verify=True)
        return True

    def add(
        self,
        vectors: ArrayLike,
        metadata: Sequence[Mapping[str, Any]],
        ids: ArrayLike | None = None,
        thumbnails: Sequence[bytes | None] | None = None,
    ) -> np.ndarray:
        """Add items in a new snapshot; all or none.

        Args:
            vectors: (n, D) real numbers, finite, no zero vector.
            metadata: n JSON objects.
            ids: n whole numbers ≥ 0 that the index does not have; without them the next free ones, which
                are never those of deleted items.
            thumbnails: n encoded pictures or None.

        Returns:
            (n,) int64: the new items' ids.

        Raises:
            InputError: An argument is not as described.
        """
        unit_nD = unit_vectors(vectors, self.dim)
        if len(unit_nD) == 0:
            return np.zeros(0, dtype=np.int64)
        with layout.writing(self.path):
            self.refresh()
            base = self._snapshot
            new_ids_n = _new_ids(base, ids, len(unit_nD))
            rows = item_rows(new_ids_n, metadata, thumbnails)
            self._publish(
                np.concatenate([base.all_vectors(), unit_nD]),
                np.concatenate([base.ids, new_ids_n]),
                lambda folder: edit_items(folder / ITEMS, insert=rows),
                lambda folder: edit_metadata(
                    base.folder / METADATA, folder / METADATA, keep=base.ids, insert=rows
                ),
            )
        return new_ids_n

    def delete(self, ids: ArrayLike) -> int:
        """Delete items in a new snapshot; all or none. Their metadata and thumbnails are erased in it.

        The snapshot before it is kept until the next change.

        Returns:
            How many items were deleted.

        Raises:
            NotFoundError: Lists the ids that the index does not have.
            InputError: An id is given twice, or is no whole number.
        """
        gone_n = check_ids(ids)
        _check_distinct(gone_n)
        if len(gone_n) == 0:
            return 0
        with layout.writing(self.path):
            self.refresh()
            base = self._snapshot
            keep_N = np.ones(len(base), dtype=bool)
            keep_N[base.rows(gone_n)] = False
            kept_N = base.ids[keep_N]
            self._publish(
                base.all_vectors()[keep_N],
                kept_N,
                lambda folder: edit_items(folder / ITEMS, delete=gone_n.tolist()),
                lambda folder: edit_metadata(base.folder / METADATA, folder / METADATA, keep=kept_N),
            )
        return len(gone_n)

    def _publish(self, vectors_ND: np.ndarray, ids_N: np.ndarray, *edits: Callable[[Path], None]) -> None:
        """Write the snapshot after the one in memory, put it in force, and move to it."""
        base = self._snapshot

        def write(folder: Path) -> None:
            shutil.copyfile(base.folder / ITEMS, folder / ITEMS)
            for edit in edits:
                edit(folder)
            write_vectors(folder, base.manifest["engine"], vectors_ND, ids_N)
            fields = {key: base.manifest[key] for key in ("model", "embeddings", "engine", "metric", "dim")}
            write_manifest(
                folder,
                "index",
                **fields,
                parent={"snapshot": base.folder.name, "sha256": base.digest},
                rows=len(ids_N),
                next_id=max(base.manifest["next_id"], int(ids_N.max(initial=-1)) + 1),
            )

        name = layout.publish(self.path, write)
        self._snapshot = Snapshot(self.path / layout.SNAPSHOTS / name, verify=False)


def _load(root: Path, verify: bool) -> Snapshot:
    """The snapshot in force; again when a writer replaced it while it was being read."""
    while True:
        name = layout.current_name(root)
        try:
            return Snapshot(root / layout.SNAPSHOTS / name, verify=verify)
        except (ArtifactError, NotFoundError, OSError) as error:
            if layout.current_name(root) != name:
                continue
            if isinstance(error, NotFoundError):
                raise ArtifactError(
                    f"{root / layout.CURRENT} names snapshot {name}, which is missing",
                    hint="build the index again",
                ) from error
            raise


def _new_ids(base: Snapshot, ids: ArrayLike | None, count: int) -> np.ndarray:
    if ids is None:
        first = int(base.manifest["next_id"])
        return np.arange(first, first + count, dtype=np.int64)
    ids_n = check_ids(ids)
    if len(ids_n) != count:
        raise InputError(f"{count} vectors came with {len(ids_n)} ids")
    if ids_n.min() < 0:
        raise InputError(f"id {ids_n.min()} is negative")
    _check_distinct(ids_n)
    known = np.isin(ids_n, base.ids)
    if known.any():
        raise InputError(f"the index has an item with id {listed(ids_n[known])} already")
    return ids_n


def _check_distinct(ids_n: np.ndarray) -> None:
    values, times = np.unique(ids_n, return_counts=True)
    if times.max(initial=1) > 1:
        raise InputError(f"id {listed(values[times > 1])} is given more than once")
