"""Shards as a map: the sample at any position, read by offset, by any process.

The index of every shard is made once, when the dataset is opened; a sample is then one positioned read per
member. Positions run over the sound samples of all shards in order; a sample's id is (shard, place in it).
Files are opened when first needed and never travel to another process.
"""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.errors import DataError
from clipkit_data.records import Record, group_faults, parse_caption, parse_meta
from clipkit_data.shards import Fault, ShardIndex, read_span, scan_shard

log = logging.getLogger("clipkit_data")
_OPEN_FILES = 64
_ID_BITS = 32


def record_id(shard: int, index: int) -> int:
    """(shard, index) as one non-negative int64."""
    return (shard << _ID_BITS) | index


class ShardDataset:
    """The samples of several shards, by position.

    Args:
        paths: Shards, in the order that numbers them; `clipkit_data.sources.resolve_shards` gives it.
        name: What to call the dataset in messages and manifests.

    Attributes:
        faults: What is wrong with the shards; samples named there are not in the dataset. A summary is
            logged as a warning.

    Raises:
        NotFoundError: A shard does not exist.
        DataError: A shard cannot be read, or no shard holds a sound sample.
    """

    def __init__(self, paths: Sequence[Path | str], name: str | None = None) -> None:
        self.name = name or ", ".join(dict.fromkeys(str(Path(path).parent) for path in paths))
        self.shards: list[ShardIndex] = [scan_shard(path) for path in paths]
        self.faults: list[Fault] = [fault for shard in self.shards for fault in shard.faults]
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + len(shard.samples))
        self._files: OrderedDict[int, int] = OrderedDict()
        if self.faults:
            counts = group_faults([fault.reason for fault in self.faults])
            words = ", ".join(f"{reason} ×{count}" for reason, count in counts.items())
            log.warning("%s: %d faults (%s): see `clipkit shards check`", self.name, len(self.faults), words)
        if not len(self):
            raise DataError(f"{self.name}: no sound sample in {len(self.shards)} shards")

    def __len__(self) -> int:
        return self._starts[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """The sample id at a position: (shard, place in the shard)."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        shard = bisect_right(self._starts, position) - 1
        return shard, position - self._starts[shard]

    def sample_id(self, position: int) -> int:
        """The sample id at a position as one int64."""
        return record_id(*self.locate(position))

    def __getitem__(self, position: int) -> Record:
        """The record at a position. Raises: RecordError for a bad caption or json; DataError."""
        shard, place = self.locate(position)
        index = self.shards[shard]
        sample = index.samples[place]
        where = f"{index.path}: {sample.key}"
        file = self._open(shard)
        data = {
            extension: read_span(file, span, f"{where}.{extension}")
            for extension, span in sample.members.items()
            if extension in (sample.image, "txt", "json")
        }
        return Record(
            id=(shard, place),
            key=sample.key,
            image=data[sample.image],
            caption=parse_caption(data["txt"], where) if "txt" in data else None,
            meta=parse_meta(data["json"], where) if "json" in data else {},
        )

    @property
    def has_captions(self) -> bool:
        """Whether the samples carry a `.txt`."""
        return any("txt" in sample.members for shard in self.shards for sample in shard.samples)

    def key(self, position: int) -> str:
        """The key of the sample at a position."""
        shard, place = self.locate(position)
        return self.shards[shard].samples[place].key

    def fingerprint(self) -> str:
        """SHA-256 over the shards' names and the keys, places and sizes of their samples."""
        digest = hashlib.sha256()
        for shard in self.shards:
            lines = [[sample.key, sample.members] for sample in shard.samples]
            digest.update(json.dumps([shard.path.name, lines], ensure_ascii=False).encode())
        return digest.hexdigest()

    def _open(self, shard: int) -> int:
        """A file handle of the shard; the least recently used one beyond a few is closed."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.shards[shard].path
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from error
        self._files[shard] = file
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def close(self) -> None:
        """Close the open files; they are opened again when needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()
