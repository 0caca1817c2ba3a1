"""One sample as every source gives it, and how its caption and its `.json` are read.

A `Record` is a picture's bytes with its caption and whatever else is known of it. What cannot be read is a
`RecordError` with a short fixed `reason`, so that faults can be counted by reason wherever they happen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from clipkit.errors import DataError


class RecordError(DataError):
    """A sample that cannot be used; `reason` is one of a few fixed phrases, for counting."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """One sample.

    Args:
        id: Shard and position in it; keys alone are not unique.
        key: The shard's key, or the picture's path.
        image: The encoded bytes of its picture, clip or graph; of the first frame; none of a text.
        caption: Its caption; None where the source has no captions.
        meta: The sample's `.json`, or a table's other columns; a `.cls` member is `meta["cls"]`.
        frames: The encoded pictures of a clip of numbered frames, in order.
        extension: Of its content, such as "jpg" or "mp4"; "" where it has none or several.
    """

    id: tuple[int, int]
    key: str
    image: bytes
    caption: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    frames: tuple[bytes, ...] = ()
    extension: str = ""


@dataclass(frozen=True, slots=True)
class SampleFault:
    """A sample that was left out: its place in the source, its key, the reason, and the whole message."""

    position: int
    key: str
    reason: str
    detail: str = ""


class RecordSource(Protocol):
    """What can be read sample by sample, in any order, by several processes.

    `name` is what it was opened as, for messages and manifests.
    """

    name: str

    @property
    def has_captions(self) -> bool:
        """Whether the samples carry captions at all."""
        ...

    def key(self, position: int) -> str:
        """The key of the sample at a position."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Record: ...

    def fingerprint(self) -> str:
        """SHA-256 over the list of samples: names, sizes, captions; not over the pictures."""
        ...


def parse_caption(data: bytes, where: str) -> str:
    """A caption from a `.txt`: UTF-8, white space at both ends removed. Raises: RecordError."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: the caption is not UTF-8", "caption is not UTF-8") from error


def parse_meta(data: bytes, where: str) -> dict[str, Any]:
    """A sample's `.json`: one object. Raises: RecordError."""
    try:
        meta = json.loads(data)
    except ValueError as error:
        raise RecordError(f"{where}: the .json is invalid: {error}", "invalid json") from error
    if not isinstance(meta, dict):
        raise RecordError(
            f"{where}: the .json holds {type(meta).__name__}, expected an object", "invalid json"
        )
    return meta


def group_faults(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason occurs, most frequent first."""
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
