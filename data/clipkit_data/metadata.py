"""The tables of an embeddings folder: what each row is called, and how it looks.

Columns come in clip-retrieval's order: `image_path`, `caption`, then the sample's `.json` with nested names
joined by dots, and last our own `id`, the sample's position in its source.
"""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit_data.records import Record

_OURS = ("image_path", "caption", "metadata")  # what clip-retrieval drops from the .json


def flatten(meta: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with its names joined by dots: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in meta.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def metadata_table(records: Sequence[Record], ids: Sequence[int], *, captions: bool) -> pa.Table:
    """One row per record.

    Args:
        records: The embedded records, in order.
        ids: Their stable ids, int64.
        captions: Whether there is a column `caption`.

    Returns:
        image_path, caption (if any), the flattened `.json` (its own `id` as `source_id`), id.
    """
    flat = [flatten(record.meta) for record in records]
    names = dict.fromkeys(name for row in flat for name in row if name not in _OURS)
    columns: dict[str, pa.Array] = {"image_path": pa.array([record.key for record in records], pa.string())}
    if captions:
        columns["caption"] = pa.array([record.caption or "" for record in records], pa.string())
    for name in names:
        columns["source_id" if name == "id" else name] = _column([row.get(name) for row in flat])
    columns["id"] = pa.array(ids, pa.int64())
    return pa.table(columns)


def _column(values: Sequence[Any]) -> pa.Array:
    """The values with the type that arrow finds, or as JSON text where they are of several kinds."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        texts = [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
        return pa.array(texts, pa.string())


def thumbnails_table(ids: Sequence[int], thumbnails: Sequence[bytes]) -> pa.Table:
    """Columns id (int64) and image (WebP bytes)."""
    return pa.table({"id": pa.array(ids, pa.int64()), "image": pa.array(thumbnails, pa.binary())})


def table_bytes(table: pa.Table) -> bytes:
    """The table as the bytes of a Parquet file."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
