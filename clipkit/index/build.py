"""From an embeddings folder to an index: `build_index`.

The embeddings' manifest is verified first, so what is read is what was written. Parts are read one at a
time: fp16 rows are normalised again in fp32, because rounding to fp16 moves a vector's length by some 1e-4.
Building in a folder that is an index already makes its next snapshot, and readers switch at once.

N: rows of all parts, D: dimension.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import ArtifactError, DataError, InputError
from clipkit.files import MANIFEST, read_manifest, sha256_file, write_manifest
from clipkit.index import layout
from clipkit.index.engines import ENGINES, load_faiss
from clipkit.index.items import ITEMS, METADATA, copy_metadata, create_items
from clipkit.index.snapshot import unit_vectors, write_vectors


def build_index(
    embeddings_folder: Path | str,
    out: Path | str,
    *,
    engine: str = "flat",
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Build an index of the image embeddings in a folder.

    Args:
        embeddings_folder: What `clipkit embed` wrote.
        out: The index folder; an existing index gets a new snapshot.
        engine: A name in `clipkit.index.engines.ENGINES`.
        progress: Called with the number of items done since the last call; N in all.

    Returns:
        `out`.

    Raises:
        NotFoundError: No such embeddings folder or engine.
        ArtifactError: The embeddings are damaged or incomplete, or `out` holds something else.
        DataError: A row cannot be indexed: not finite, length 0, an id that is missing or given twice.
        DependencyError: faiss is not installed.
    """
    source, root = Path(embeddings_folder), Path(out)
    ENGINES.get(engine)
    load_faiss()
    layout.check_target(root)
    manifest = read_manifest(source, "embeddings")
    vectors_ND, ids_N = _read_rows(source, manifest)

    def write(folder: Path) -> None:
        tables = _parts(source, METADATA)
        copy_metadata(tables, folder / METADATA, ids_N)
        create_items(folder / ITEMS, tables, _parts(source, "thumbnails"), progress or (lambda done: None))
        write_vectors(folder, engine, vectors_ND, ids_N)
        write_manifest(
            folder,
            "index",
            model=manifest["model"],
            embeddings=sha256_file(source / MANIFEST),
            parent=None,
            engine=engine,
            metric="inner_product",
            dim=vectors_ND.shape[1],
            rows=len(ids_N),
            next_id=int(ids_N.max()) + 1,
        )

    with layout.writing(root):
        layout.publish(root, write)
    return root


def _parts(folder: Path, name: str, suffix: str = "parquet") -> list[Path]:
    """A folder's parts; their numbers are padded with zeros, so their names sort as they count."""
    return sorted((folder / name).glob(f"{name}_*.{suffix}"))


def _read_rows(source: Path, manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D) float32 of length 1, and ids (N,) int64, of all parts."""
    try:
        dim, counts = int(manifest["model"]["dim"]), [int(part["rows"]) for part in manifest["parts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the manifest of {source} lacks model.dim or parts: {error!r}") from error
    arrays, tables = _parts(source, "img_emb", "npy"), _parts(source, METADATA)
    if not len(arrays) == len(tables) == len(counts):
        raise ArtifactError(
            f"{source} has {len(arrays)} img_emb and {len(tables)} metadata parts, "
            f"its manifest names {len(counts)}",
            hint="finish or repeat clipkit embed",
        )
    if sum(counts) == 0:
        raise DataError(f"{source} holds no pictures", hint="embed a source that has some")
    vectors_ND = np.empty((sum(counts), dim), dtype=np.float32)
    ids_N = np.empty(sum(counts), dtype=np.int64)
    start = 0
    for array, table, count in zip(arrays, tables, counts, strict=True):
        vectors_ND[start : start + count] = _read_vectors(array, count, dim)
        ids_N[start : start + count] = _read_ids(table, count)
        start += count
    values, times = np.unique(ids_N, return_counts=True)
    if times.max() > 1:
        raise DataError(f"{source}: id {values[times.argmax()]} is given {times.max()} times")
    return vectors_ND, ids_N


def _read_vectors(part: Path, count: int, dim: int) -> np.ndarray:
    try:
        array = np.load(part, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{part} is not a readable .npy file: {error}") from error
    if array.shape != (count, dim):
        raise DataError(f"{part} has shape {array.shape}, its manifest says {(count, dim)}")
    try:
        return unit_vectors(array, dim, name=str(part))
    except InputError as error:
        raise DataError(error.message, error.hint) from error


def _read_ids(part: Path, count: int) -> np.ndarray:
    try:
        column = pq.read_table(part, columns=["id"])["id"]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{part}: the column id cannot be read: {error}") from error
    if len(column) != count:
        raise DataError(f"{part} has {len(column)} rows, its manifest says {count}")
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(
            f"{part}: the column id is {column.type} with {column.null_count} nulls, not whole numbers"
        )
    ids_n = column.to_numpy().astype(np.int64)
    if count and ids_n.min() < 0:
        raise DataError(f"{part}: row {ids_n.argmin()} has the negative id {ids_n.min()}")
    return ids_n
