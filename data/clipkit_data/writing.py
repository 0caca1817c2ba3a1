"""Shards as img2dataset lays them out: `00000.tar` with its `_stats.json` and `.parquet` beside it.

The same samples give the same bytes: member times are 0 and owners are fixed. Each file is written to a
temporary name, fsynced and renamed, the tar first; a folder with a `_stats.json` for each tar is whole,
and the SHA-256 in it tells when a tar has changed since.
"""

import io
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

from clipkit.errors import ConfigError
from clipkit.files import atomic_write, fsync_path, sha256_file

SHARD_DIGITS = 5


def write_shards(samples: Iterable[dict[str, Any]], out: Path, *, per_shard: int = 10_000) -> list[Path]:
    """Write samples as shards, one at a time: only the shard's rows without pictures are held in memory.

    Args:
        samples: Each `{"image": bytes, "ext": "webp", "caption": str, "json": {…}}`; "json" may be missing.
            `key` (shard number and place, as img2dataset makes it), `caption` and `status` are added to it.
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
    digits = max(len(str(per_shard - 1)), 4)
    rest = iter(samples)
    shards: list[Path] = []
    for first in rest:
        part = chain([first], islice(rest, per_shard - 1))
        shards.append(_write_shard(part, out, f"{len(shards):0{SHARD_DIGITS}d}", digits))
    return shards


def _write_shard(samples: Iterable[dict[str, Any]], out: Path, name: str, digits: int) -> Path:
    rows = []
    temporary = out / f".{name}.tar.part"
    with temporary.open("wb") as file:
        with TarWriter(file, mtime=0, user="clipkit", group="clipkit", encoder=False) as writer:
            for place, sample in enumerate(samples):
                own = {"key": f"{name}{place:0{digits}d}", "caption": sample["caption"], "status": "success"}
                row = own | sample.get("json", {}) | own
                writer.write(
                    {
                        "__key__": own["key"],
                        sample["ext"]: sample["image"],
                        "txt": sample["caption"].encode(),
                        "json": json.dumps(row, ensure_ascii=False).encode(),
                    }
                )
                rows.append(row)
        file.flush()
        os.fsync(file.fileno())
    stats = {
        "count": len(rows),
        "successes": len(rows),
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": len(rows)},
        "sha256": sha256_file(temporary),
    }
    shard = out / f"{name}.tar"
    os.replace(temporary, shard)
    fsync_path(out)
    atomic_write(out / f"{name}.parquet", _parquet(rows))
    atomic_write(out / f"{name}_stats.json", json.dumps(stats, indent=2) + "\n")
    return shard


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    """The rows' json as a table; a column of mixed kinds or with objects becomes JSON text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        texts = [json.dumps(value, ensure_ascii=False) for value in values]
        try:
            objects = any(isinstance(value, dict) for value in _flat(values))
            columns[name] = pa.array(texts if objects else values)
        except (pa.ArrowException, OverflowError):
            columns[name] = pa.array(texts)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value
