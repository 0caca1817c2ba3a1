"""`manifest.json`: what the shards of a folder hold, in one file.

An index file (`clipkit_data.shards.index_file`) says where each sample of a shard lies; the manifest says,
for a whole folder, how many samples each shard has and the digest of their list. So thousands of shards are
opened by reading one file, and the index of a shard is read when its first sample is.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.errors import DataError
from clipkit.files import atomic_write
from clipkit_data.shards.energon import EnergonSamples
from clipkit_data.shards.index_file import SampleTable
from clipkit_data.shards.scan import ShardIndex

MANIFEST = "manifest.json"
FORMAT = 1


class Entry(NamedTuple):
    """What a manifest says of one shard.

    Args:
        name: File name.
        bytes: Size of the tar file.
        samples: Sound samples in it.
        digest: SHA-256 over their keys and members, see `clipkit_data.shards.index_file`.
        faults: How many faults its index file lists.
        extensions: The extensions of its samples' members, by name.
        contents: SHA-256 over the CRC-32s of its samples' data; None where nobody has read them.
    """

    name: str
    bytes: int
    samples: int
    digest: str
    faults: int
    extensions: tuple[str, ...]
    contents: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The entry as plain JSON."""
        own = self._asdict() | {"extensions": list(self.extensions)}
        return {name: value for name, value in own.items() if value is not None}


def entry_of(name: str, index: ShardIndex, samples: SampleTable | EnergonSamples) -> Entry:
    """The manifest's entry for a shard with this index and its samples in columns."""
    extensions = tuple(samples.extensions)
    faults = len(index.faults)
    return Entry(name, index.bytes, len(samples), samples.digest, faults, extensions, samples.contents)


def parse_manifest(data: bytes, name: str) -> dict[str, Entry]:
    """The shards of a manifest by file name. Raises: DataError when it is none, or of a newer format."""
    try:
        found = json.loads(data)
        if found["format"] > FORMAT:
            raise DataError(f"{name}: format {found['format']} is newer than this clipkit reads ({FORMAT})")
        same: dict[tuple[str, ...], tuple[str, ...]] = {}  # thousands of shards have the same extensions
        entries = {}
        for shard in found["shards"]:
            extensions = tuple(shard["extensions"])
            shard["extensions"] = same.setdefault(extensions, extensions)
            own = {field: shard[field] for field in Entry._fields if field in shard}
            entries[shard["name"]] = Entry(**own)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is no manifest of shards: {error!r}") from error
    return entries


def write_manifest(folder: Path, entries: dict[str, Entry]) -> Path:
    """Write the manifest of a folder. Raises: DataError."""
    lines = ",\n".join(json.dumps(entries[name].to_json(), ensure_ascii=False) for name in sorted(entries))
    path = folder / MANIFEST
    try:
        atomic_write(path, f'{{"format": {FORMAT}, "shards": [\n{lines}\n]}}\n')
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
