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

Entry = tuple[dict[str, bytes], dict[str, Any]]
"""A sample for a shard: its members' bytes by extension, and its row of the table beside the shard."""


def shard_name(number: int, count: int = 0) -> str:
    """The name of a shard without `.tar`; with `count` shards in all, names sort as numbers do."""
    return f"{number:0{max(SHARD_DIGITS, len(str(count - 1)))}d}"


def sample_key(name: str, place: int, per_shard: int) -> str:
    """The key of a sample: the shard's name and the place in it, as img2dataset makes it."""
    return f"{name}{place:0{max(len(str(per_shard - 1)), 4)}d}"


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
    rest = iter(samples)
    shards: list[Path] = []
    for first in rest:
        name = shard_name(len(shards))
        part = enumerate(chain([first], islice(rest, per_shard - 1)))
        write_shard((entry(sample_key(name, place, per_shard), sample) for place, sample in part), out, name)
        shards.append(out / f"{name}.tar")
    return shards


def entry(key: str, sample: dict[str, Any]) -> Entry:
    """A sample as `write_shards` takes it, with its key, as `write_shard` takes it."""
    own = {"key": key, "caption": sample["caption"], "status": "success"}
    row = own | sample.get("json", {}) | own
    text = {"txt": sample["caption"].encode(), "json": json.dumps(row, ensure_ascii=False).encode()}
    return {sample["ext"]: sample["image"], **text}, row


def write_shard(entries: Iterable[Entry], out: Path, name: str) -> int:
    """Write one shard with its table and statistics.

    Args:
        entries: Members and row of each sample; the row's `key` is the sample's key.
        out: A folder that is there.
        name: The shard's name without `.tar`.

    Returns:
        The number of samples; when it is 0, nothing is written.
    """
    rows = []
    temporary = out / f".{name}.tar.part"
    try:
        with temporary.open("wb") as file:
            # PAX headers stand only where a name or size needs one: other members are ustar's bytes.
            options: dict[str, Any] = {"encoder": False, "keep_meta": True, "format": "PAX_FORMAT"}
            with TarWriter(file, mtime=0, user="clipkit", group="clipkit", **options) as writer:
                for members, row in entries:
                    writer.write({"__key__": row["key"], **members})
                    rows.append(row)
            file.flush()
            os.fsync(file.fileno())
        if not rows:
            return 0
        stats = {
            "count": len(rows),
            "successes": len(rows),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": len(rows)},
            "sha256": sha256_file(temporary),
        }
        os.replace(temporary, out / f"{name}.tar")
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(out)
    atomic_write(out / f"{name}.parquet", _parquet(rows))
    atomic_write(out / f"{name}_stats.json", json.dumps(stats, indent=2) + "\n")
    return len(rows)


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
