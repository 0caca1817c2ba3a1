"""A shard's index as a file beside it: `00000_index.parquet` for `00000.tar`.

One row for each sound sample, in file order: its key, where its first header and its members lie, and the
CRC-32 of its data. In memory it is the same columns (`SampleTable`), about 60 bytes for a sample, and a
sample is made when it is asked for. The schema's metadata under `clipkit` is JSON: the shard's size, the
number of samples found, the faults, and the digest of the rows, by which a damaged index file is known.

`digest` is SHA-256 over keys and members, without the CRC-32s: an index that was read from a file and one
that was just made by a scan of the headers have the same.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.errors import DataError
from clipkit.files import atomic_write
from clipkit_data.shards.sample import Sample, crc32_of, read_sample
from clipkit_data.shards.scan import Fault, ShardIndex

FORMAT = 1
AGAIN = "run `clipkit shards index` on the shards"
CHANGED = "run `clipkit shards check`, and `clipkit shards index` if the change was meant"
_META = b"clipkit"
_MEMBER = pa.struct([("extension", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_SCHEMA = pa.schema(
    [("key", pa.string()), ("header", pa.int64()), ("members", pa.list_(_MEMBER)), ("crc32", pa.uint32())]
)


class SampleTable(Sequence[Sample]):
    """Samples in columns.

    Args:
        table: Rows as in an index file; `crc32` is null everywhere when it is not known.
    """

    def __init__(self, table: pa.Table) -> None:
        self._keys = table.column("key").combine_chunks()
        self._headers = table.column("header").to_numpy()
        lists = table.column("members").combine_chunks()
        members = lists.flatten()
        names = members.field("extension").dictionary_encode()
        self._ends = np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False), dtype=np.int64)
        self._names: list[str] = names.dictionary.to_pylist()
        self._codes = names.indices.to_numpy().astype(np.uint16)
        self._offsets = members.field("offset").to_numpy()
        self._sizes = members.field("size").to_numpy()
        crc32 = table.column("crc32")
        self._crc32 = None if crc32.null_count or not len(table) else crc32.to_numpy()

    @property
    def has_crc32(self) -> bool:
        """Whether the CRC-32 of every sample is known."""
        return self._crc32 is not None or not len(self)

    @property
    def extensions(self) -> list[str]:
        """All extensions that occur, by name."""
        return sorted(self._names)

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, place: int) -> str:
        """The key of one sample."""
        return self._keys[place].as_py()

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[number] for number in places]
        start, end = self._ends[places - 1] if places else 0, self._ends[places]
        members = {
            self._names[code]: (offset, size)
            for code, offset, size in zip(
                self._codes[start:end].tolist(),
                self._offsets[start:end].tolist(),
                self._sizes[start:end].tolist(),
                strict=True,
            )
        }
        crc32 = None if self._crc32 is None else int(self._crc32[places])
        return Sample(self.key(places), members, int(self._headers[places]), crc32)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the keys, and over the members' extensions, offsets and sizes."""
        digest = hashlib.sha256()
        names = [self._names[code] for code in self._codes.tolist()]
        digest.update(json.dumps([self._keys.to_pylist(), names]).encode())
        for numbers in (self._ends, self._offsets, self._sizes):
            digest.update(numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    @property
    def contents(self) -> str | None:
        """SHA-256 over the CRC-32s of the samples' data; None where they are not known."""
        if self._crc32 is None:
            return None
        return hashlib.sha256(self._crc32.astype("<u4").tobytes()).hexdigest()


def as_table(samples: Sequence[Sample], crc32: Sequence[int] | None = None) -> pa.Table:
    """Samples as the rows of an index file, `crc32` null where it is None."""
    rows = [
        [sample.key for sample in samples],
        [sample.header for sample in samples],
        [[(name, *span) for name, span in sample.members.items()] for sample in samples],
        [None] * len(samples) if crc32 is None else crc32,
    ]
    arrays = [pa.array(values, column.type) for values, column in zip(rows, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def in_columns(samples: Sequence[Sample]) -> SampleTable:
    """The samples of a scan as a table."""
    return samples if isinstance(samples, SampleTable) else SampleTable(as_table(samples))


def index_name(shard: str) -> str:
    """The name of a shard's index file, from its own or from its whole path."""
    return f"{os.path.splitext(shard)[0]}_index.parquet"


def index_path(shard: Path) -> Path:
    """Where the index file of a shard is."""
    return shard.with_name(index_name(shard.name))


def write_index(shard: Path, index: ShardIndex, crc32: Sequence[int]) -> SampleTable:
    """Write a shard's index file, whole or not at all.

    Args:
        shard: The tar file.
        index: What a scan found.
        crc32: Of each sample's data.

    Returns:
        The samples as they were written.
    """
    table = as_table(index.samples, crc32)
    samples = SampleTable(table)
    faults = [fault.to_json() | {"shard": shard.name} for fault in index.faults]
    meta = {
        "format": FORMAT,
        "bytes": index.bytes,
        "groups": index.groups,
        "faults": faults,
        "digest": samples.digest,
    }
    buffer = io.BytesIO()
    schema = _SCHEMA.with_metadata({_META: json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")})
    pq.write_table(table.cast(schema), buffer, compression="zstd", write_page_checksum=True)
    atomic_write(index_path(shard), buffer.getvalue())
    return samples


def parse_index(data: bytes, name: str, shard: str, size: int | None = None) -> ShardIndex:
    """The index in the bytes of an index file.

    Args:
        data: The whole file.
        name: What to call the file in messages.
        shard: What to call the shard in the index and its faults.
        size: Bytes in the shard as it is now; None where it is not known.

    Raises:
        DataError: It is damaged, of a newer format, or of another shard.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read(use_threads=False)  # a forked worker has no threads
        meta = json.loads((table.schema.metadata or {})[_META])
        if meta["format"] > FORMAT:
            raise DataError(f"{name}: format {meta['format']} is newer than this clipkit reads ({FORMAT})")
        samples = SampleTable(table.select(_SCHEMA.names).cast(_SCHEMA))
        faults = [Fault(**(fault | {"shard": shard})) for fault in meta["faults"]]
        index = ShardIndex(shard, samples, faults, int(meta["groups"]), int(meta["bytes"]))
        sound = samples.digest == meta["digest"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: the index file is damaged: {error}", hint=AGAIN) from error
    if not sound:
        raise DataError(f"{name}: the index file is damaged: its rows are not those it was made of", AGAIN)
    if size is not None and index.bytes != size:
        raise DataError(f"{name} is of a shard of {index.bytes} bytes, this one has {size}", hint=AGAIN)
    return index


def read_index(shard: Path, size: int | None = None) -> ShardIndex | None:
    """The index in the file beside a shard, None when there is no such file.

    Args:
        shard: The tar file; it is not read.
        size: See `parse_index`.

    Raises:
        DataError: See `parse_index`.
    """
    path = index_path(shard)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_index(data, str(path), str(shard), size)


def newer(shard: os.stat_result, beside: Path | str) -> bool:
    """Whether a shard was written after a file beside it, or that file is not there."""
    try:
        return shard.st_mtime_ns > os.stat(beside).st_mtime_ns
    except OSError:
        return True


def with_crc32(shard: Path, samples: Sequence[Sample]) -> tuple[Sequence[Sample], str | None]:
    """The samples of a scan with the CRC-32s of the index file beside the shard, or what is wrong with it."""
    try:
        index = read_index(shard, shard.stat().st_size)
    except DataError as error:
        return samples, str(error)
    if index is None:
        return samples, None
    found = in_columns(index.samples)
    if found.digest != in_columns(samples).digest:
        return samples, f"{index_path(shard).name} lists other samples than the shard holds: {AGAIN}"
    return found, None


def iter_crc32(shard: Path, samples: Sequence[Sample]) -> Iterator[int]:
    """The CRC-32 of each sample's data, in order: one pass through the file. Raises: DataError."""
    file = os.open(shard, os.O_RDONLY)
    try:
        for sample in samples:
            yield crc32_of(read_sample(file, sample, shard).values())
    finally:
        os.close(file)
