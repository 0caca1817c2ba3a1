"""Shards as a map: the sample at any position, read by offset, by any process.

What is kept of a shard is a row: its name, size, number of samples and digest. Where its samples lie is read
from its index file when the first of them is wanted, and forgotten again when many others were wanted since;
without index files (`clipkit shards index`) every shard is scanned at the start and its places are kept.
Positions run over the sound samples of all shards in order; a sample's id is (shard, place in it).
Files are opened when first needed and never travel to another process.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import DataError
from clipkit_data.records import Record, group_faults
from clipkit_data.remote.cache import ShardFiles
from clipkit_data.remote.storage import is_remote
from clipkit_data.shards.energon import EnergonSamples
from clipkit_data.shards.index_file import CHANGED, SampleTable
from clipkit_data.shards.manifest import Entry
from clipkit_data.shards.opening import describe, label, load_index, shard_name
from clipkit_data.shards.sample import Sample, read_sample, to_record
from clipkit_data.shards.scan import Fault, ShardIndex, scan_shard

log = logging.getLogger("clipkit_data")
_OPEN_FILES = 64
_KEPT_SAMPLES = 1 << 22  # of index files that were read, 250 MB
_ID_BITS = 32


def record_id(shard: int, index: int) -> int:
    """(shard, index) as one non-negative int64."""
    return (shard << _ID_BITS) | index


class ShardDataset:
    """The samples of several shards, by position.

    Args:
        paths: Shards, paths or URLs, in the order that numbers them; `clipkit_data.sources.resolve_shards`
            gives it.
        name: What to call the dataset in messages and manifests.
        files: Brings remote shards here; by default `ShardFiles()`.
        jobs: Threads that scan shards without an index.
        progress: Called with the number of shards that were opened.

    Attributes:
        paths: The shards, as strings.
        sizes: Sound samples in each shard, int64 (S,).
        faults: What is wrong with the shards; samples named there are not in the dataset. A summary is
            logged as a warning.

    Raises:
        NotFoundError: A shard does not exist.
        DataError: A shard cannot be read, or no shard holds a sound sample.
    """

    def __init__(
        self,
        paths: Sequence[Path | str],
        name: str | None = None,
        *,
        files: ShardFiles | None = None,
        jobs: int | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        self.paths = [str(path) for path in paths]
        folders = (os.path.dirname(label(path)) or "." for path in self.paths)
        self.name = name or ", ".join(dict.fromkeys(folders))
        self.remote = any(map(is_remote, self.paths))
        self.files = ShardFiles() if self.remote and files is None else files
        self.faults: list[Fault] = []
        self._kept: dict[int, SampleTable | EnergonSamples] = {}  # what cannot be read from a file again
        self._read: OrderedDict[int, SampleTable | EnergonSamples] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._describe(jobs, progress)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        if self.faults:
            counts = group_faults([fault.reason for fault in self.faults])
            words = ", ".join(f"{reason} ×{count}" for reason, count in counts.items())
            log.warning("%s: %d faults (%s): see `clipkit shards check`", self.name, len(self.faults), words)
        if not len(self):
            raise DataError(f"{self.name}: no sound sample in {len(self.paths)} shards")

    def _describe(self, jobs: int | None, progress: Callable[[int], Any] | None) -> None:
        """Learn what is in the shards."""
        found = describe(self.paths, self.files, log.warning, jobs=jobs, progress=progress)
        entries = [one.entry for one in found]
        self.sizes = np.array([entry.samples for entry in entries], dtype=np.int64)
        self._bytes = np.array([entry.bytes for entry in entries], dtype=np.int64)
        self._digests = [bytes.fromhex(entry.digest) for entry in entries]
        self._fault_counts = [entry.faults for entry in entries]
        self._extensions = [entry.extensions for entry in entries]
        self._contents = [bytes.fromhex(entry.contents) if entry.contents else None for entry in entries]
        for number, one in enumerate(found):
            self.faults += one.faults
            if one.samples is not None:
                self._kept[number] = one.samples

    @property
    def shard_names(self) -> list[str]:
        """The shards' file names, in order."""
        return [shard_name(path) for path in self.paths]

    @property
    def total_bytes(self) -> int:
        """The size of all shards together."""
        return int(self._bytes.sum())

    @property
    def cache_limit(self) -> int | None:
        """How many bytes copies of remote shards may take; None without a limit or remote shards."""
        return self.files.limit_bytes if self.files is not None and self.remote else None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """The sample id at a position: (shard, place in the shard)."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        shard = int(np.searchsorted(self._starts, position, side="right")) - 1
        return shard, int(position - self._starts[shard])

    def sample_id(self, position: int) -> int:
        """The sample id at a position as one int64."""
        return record_id(*self.locate(position))

    def __getitem__(self, position: int) -> Record:
        """The record at a position.

        Raises:
            RecordError: Its caption or json is bad, or its bytes are not those that were indexed ("CRC").
            DataError: The shard cannot be read, or changed since it was opened.
        """
        shard, place = self.locate(position)
        sample, data = self._members(shard, place)
        where = f"{label(self.paths[shard])}: {sample.key}"
        return to_record((shard, place), sample.key, data, where)

    def members(self, position: int) -> dict[str, bytes]:
        """All members of the sample at a position, by extension, as they lie in the shard.

        Raises:
            RecordError: The bytes are not those that were indexed ("CRC").
            DataError: The shard cannot be read, or changed since it was opened.
        """
        return self._members(*self.locate(position))[1]

    def _members(self, shard: int, place: int) -> tuple[Sample, dict[str, bytes]]:
        sample = self._samples(shard)[place]
        return sample, read_sample(self._open(shard), sample, label(self.paths[shard]))

    @property
    def has_captions(self) -> bool:
        """Whether any samples carry a `.txt`."""
        return any("txt" in extensions for extensions in self._extensions)

    def key(self, position: int) -> str:
        """The key of the sample at a position."""
        shard, place = self.locate(position)
        return self._samples(shard).key(place)

    def fingerprint(self) -> str:
        """SHA-256 over the shards' names and digests: the keys, places and sizes of their samples.

        The samples' bytes and their CRC-32s have no part in it, so it is the same with index files and
        without. By a `.tar.idx` alone nothing is known of members: then it is over the samples' offsets.
        """
        digest = hashlib.sha256()
        for name, own in zip(self.shard_names, self._digests, strict=True):
            digest.update(json.dumps([name, own.hex()], ensure_ascii=False).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def manifest(self) -> list[dict[str, Any]]:
        """For each shard `{"name", "bytes", "samples", "digest", "faults", "extensions", "contents"}`.

        `contents` is over its samples' CRC-32s, and missing where they are not known.
        """
        rows = zip(
            self.shard_names,
            self._bytes.tolist(),
            self.sizes.tolist(),
            map(bytes.hex, self._digests),
            self._fault_counts,
            self._extensions,
            (None if contents is None else contents.hex() for contents in self._contents),
            strict=True,
        )
        return [Entry(*row).to_json() for row in rows]

    @property
    def shards(self) -> Iterator[ShardIndex]:
        """The index of each shard, one after another, without its faults (see `faults`)."""
        for number, path in enumerate(self.paths):
            samples = self._samples(number)
            if isinstance(samples, EnergonSamples):  # whose samples may prove to be none
                yield scan_shard(path)
            else:
                yield ShardIndex(path, samples, groups=len(samples), bytes=int(self._bytes[number]))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch shards, by number, in the background; nothing happens for those that are here.

        Nor where together they do not fit the cache: then they would drive out those that are being read.
        """
        wanted = [shard for shard in shards if is_remote(self.paths[shard])]
        if not wanted or self.files is None:
            return
        if self.cache_limit is None or self._bytes[wanted].sum() <= self.cache_limit:
            self.files.prefetch([self.paths[shard] for shard in wanted])

    def _samples(self, shard: int) -> SampleTable | EnergonSamples:
        """Where a shard's samples lie."""
        if shard in self._kept:
            return self._kept[shard]
        if shard not in self._read:
            self._read[shard] = self._load(shard)
            left = sum(map(len, self._read.values())) - _KEPT_SAMPLES
            while left > 0 and len(self._read) > 1:
                left -= len(self._read.popitem(last=False)[1])
        self._read.move_to_end(shard)
        return self._read[shard]

    def _load(self, shard: int) -> SampleTable | EnergonSamples:
        path = self.paths[shard]
        samples = load_index(path, self.files, log.warning, int(self._bytes[shard])).samples
        assert isinstance(samples, SampleTable | EnergonSamples)
        contents, known = samples.contents, self._contents[shard]
        other = contents is not None and known is not None and contents != known.hex()
        if other or samples.digest != self._digests[shard].hex():
            raise DataError(
                f"{label(path)} holds other samples than its folder's manifest or its index file said",
                hint=CHANGED,
            )
        return samples

    def _open(self, shard: int) -> int:
        """A file handle of the shard; the least recently used one beyond a few is closed.

        So are those of copies that have made room in the cache meanwhile: an open file that was removed takes
        its place on the disk still, uncounted. What stays open is therefore what fits the cache.
        """
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.paths[shard]
        try:
            if self.files is not None:
                file = self.files.open(path, int(self._bytes[shard]))
            else:
                file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{label(path)}: cannot be opened: {error.strerror or error}") from error
        if os.fstat(file).st_size != self._bytes[shard]:
            os.close(file)
            raise DataError(f"{label(path)}: the shard changed after it was opened", hint=CHANGED)
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        if self.files is not None:
            for other in [other for other, kept in self._files.items() if not os.fstat(kept).st_nlink]:
                os.close(self._files.pop(other))
        self._files[shard] = file
        return file

    def close(self) -> None:
        """Close the open files; they are opened again when needed."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_read": OrderedDict()}

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()
