"""Shards as img2dataset lays them out: `00000.tar` with its `_stats.json` and `.parquet` beside it.

The same samples give the same bytes: member times are 0 and owners are fixed. Each file is written to a
temporary name, fsynced and renamed, the tar first; a folder with a `_stats.json` for each tar is whole.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

from clipkit.errors import ConfigError
from clipkit.files import atomic_write, fsync_path

SHARD_DIGITS = 5


def write_shards(samples: Iterable[dict[str, Any]], out: Path, *, per_shard: int = 10_000) -> list[Path]:
    """Write samples as shards.

    Args:
        samples: Each `{"image": bytes, "ext": "webp", "caption": str, "json": {…}}`; "json" may be missing.
            A key as img2dataset makes it (shard number and place) is added to the json.
        out: The folder; it is made if missing, and files of the same names are replaced.
        per_shard: Samples per shard.

    Returns:
        The shards' paths, in order.

    Raises:
        ConfigError: `per_shard` is below 1.
    """
    if per_shard < 1:
        raise ConfigError(f"per_shard must be at least 1, got {per_shard}")
    out.mkdir(parents=True, exist_ok=True)
    digits = len(str(per_shard - 1)) if per_shard > 1 else 1
    rest = iter(samples)
    shards: list[Path] = []
    while part := list(islice(rest, per_shard)):
        shards.append(_write_shard(part, out, len(shards), max(digits, 4)))
    return shards


def _write_shard(samples: list[dict[str, Any]], out: Path, number: int, digits: int) -> Path:
    name = f"{number:0{SHARD_DIGITS}d}"
    rows = []
    temporary = out / f".{name}.tar.part"
    with temporary.open("wb") as file:
        with webdataset.TarWriter(file, mtime=0, user="clipkit", group="clipkit", encoder=False) as writer:
            for key, sample in _keyed(samples, name, digits):
                row = {"key": key, "caption": sample["caption"], "status": "success", **sample.get("json", {})}
                writer.write(
                    {
                        "__key__": key,
                        sample["ext"]: sample["image"],
                        "txt": sample["caption"].encode(),
                        "json": json.dumps(row, ensure_ascii=False).encode(),
                    }
                )
                rows.append(row)
        file.flush()
        os.fsync(file.fileno())
    shard = out / f"{name}.tar"
    os.replace(temporary, shard)
    fsync_path(out)
    atomic_write(out / f"{name}.parquet", _parquet(rows))
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": len(rows)},
    }
    atomic_write(out / f"{name}_stats.json", json.dumps(stats, indent=2) + "\n")
    return shard


def _keyed(samples: list[dict[str, Any]], name: str, digits: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, sample in enumerate(samples):
        yield f"{name}{place:0{digits}d}", sample


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    """The rows' json as a table; values of mixed kinds in a column become JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([json.dumps(value, ensure_ascii=False) for value in values])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
