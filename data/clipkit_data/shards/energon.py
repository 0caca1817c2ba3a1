"""Megatron-Energon's index of a shard: `00000.tar.idx` beside `00000.tar`.

Its format is a list of unsigned 64-bit numbers, little-endian: the offset of each sample's first header, and
at last where the archive's end begins. It says nothing of members, so the headers of a sample are read, and
their checksums verified, when the sample is: opening a shard costs one small read. What a scan would find
beforehand (a missing caption, a repeated key, damage) comes up only there, as a fault of one sample.

Reference: megatron-energon 7.4, `flavors/webdataset/itar.py` (`TarIndexReader`) and `prepare.py`.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from clipkit.errors import DataError
from clipkit.files import atomic_write
from clipkit_data.records import RecordError
from clipkit_data.shards.sample import Sample, contents_of
from clipkit_data.shards.scan import is_metadata, split_name
from clipkit_data.shards.tar import BLOCK, Damage, scan_part, scan_tar


def energon_path(shard: Path) -> Path:
    """Where the index of a shard is."""
    return shard.with_name(f"{shard.stem}.tar.idx")


class EnergonSamples(Sequence[Sample]):
    """The samples of a shard by its `.tar.idx`.

    Args:
        shard: The tar file.
        offsets: uint64 (samples + 1,), what the index holds.
    """

    has_crc32 = False
    contents = None

    def __init__(self, shard: Path, offsets: np.ndarray) -> None:
        self.shard, self.offsets = shard, offsets

    @property
    def extensions(self) -> list[str]:
        """The extensions of the first sample that can be read, by name."""
        for sample in self._readable():
            return sorted(sample.members)
        return []

    @property
    def digest(self) -> str:
        """SHA-256 over the offsets."""
        return hashlib.sha256(b"tar.idx" + self.offsets.astype("<u8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def key(self, place: int) -> str:
        """The key of one sample, or where it lies when its headers cannot be read."""
        try:
            return self[place].key
        except RecordError:
            return f"offset {self.offsets[place]}"

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        """The sample at a place. Raises: RecordError when its headers are damaged or it has no picture."""
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[number] for number in places]
        start, stop = int(self.offsets[places]), int(self.offsets[places + 1])
        try:
            file = os.open(self.shard, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.shard}: cannot be opened: {error.strerror or error}") from error
        try:
            return self._sample(file, start, stop)
        finally:
            os.close(file)

    def _sample(self, file: int, start: int, stop: int) -> Sample:
        members: dict[str, tuple[int, int]] = {}
        keys = set()
        for entry in scan_part(file, start, stop):
            if isinstance(entry, Damage):
                raise RecordError(f"{self.shard}: {entry.reason} at offset {entry.offset}", entry.reason)
            names = split_name(entry.name)
            if names and not is_metadata(entry.name):
                keys.add(names[0])
                if names[1] in members:
                    raise self._fault(start, "duplicate member")
                members[names[1]] = entry.offset, entry.size
        if len(keys) != 1:
            raise self._fault(start, "members are not adjacent")
        contents = contents_of(members)
        if len(contents) != 1:  # shards of texts alone are read by their own index
            reason = "several pictures" if contents else "missing picture"
            raise self._fault(start, reason, f": it has {', '.join(members)}")
        return Sample(keys.pop(), members, start)

    def _fault(self, offset: int, reason: str, detail: str = "") -> RecordError:
        return RecordError(f"{self.shard}: sample at offset {offset}: {reason}{detail}", reason)

    def _readable(self) -> Iterator[Sample]:
        for place in range(len(self)):
            try:
                yield self[place]
            except RecordError:
                continue


def read_energon_index(shard: Path) -> EnergonSamples | None:
    """The samples of a shard by the `.tar.idx` beside it.

    Returns:
        None when there is none, or it does not fit the shard: its offsets must rise, and the archive must end
        where the last one says, with two blocks of zeros.
    """
    try:
        data = energon_path(shard).read_bytes()
        with shard.open("rb") as file:
            offsets = np.frombuffer(data[: len(data) // 8 * 8], "<u8").astype(np.int64)
            rising = len(offsets) > 1 and len(data) % 8 == 0 and bool((np.diff(offsets) > 0).all())
            if not rising or (offsets % BLOCK).any() or offsets[0] < 0:
                return None
            file.seek(int(offsets[-1]))
            fits = file.read(2 * BLOCK) == bytes(2 * BLOCK)
    except OSError:
        return None
    return EnergonSamples(shard, offsets) if fits else None


def export_energon_index(shard: Path | str) -> Path:
    """Write the `.tar.idx` of a shard, as `energon prepare` does.

    Args:
        shard: A sound tar file.

    Returns:
        The file's path.

    Raises:
        DataError: The tar is damaged: its samples cannot be told apart by offsets alone.
    """
    shard = Path(shard)
    offsets, key, end = [], None, 0
    for entry in scan_tar(shard):
        if isinstance(entry, Damage):
            if not entry.lost:
                continue
            raise DataError(
                f"{shard}: {entry.reason} at offset {entry.offset}: no .tar.idx for damaged shards"
            )
        names = split_name(entry.name)
        if names and not is_metadata(entry.name):
            if names[0] != key:
                offsets.append(entry.header)
            key = names[0]
        end = entry.offset + -(-entry.size // BLOCK) * BLOCK
    path = energon_path(shard)
    atomic_write(path, np.array([*offsets, end], "<u8").tobytes())
    return path
