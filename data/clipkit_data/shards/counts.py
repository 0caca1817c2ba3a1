"""What other files in a shard's folder say of its number of samples.

img2dataset writes `00000_stats.json` beside `00000.tar`, with `successes`; open_clip writes `sizes.json` in
the folder, with a number for each shard. Both are compared with what a scan finds. They never stand in for
one: a number of samples is no list of places, and a cut shard still has its old number beside it.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any


def stats_path(shard: Path) -> Path:
    """Where img2dataset (or `clipkit shards pack`) writes of a shard."""
    return shard.with_name(f"{shard.stem}_stats.json")


def read_stats(shard: Path) -> dict[str, Any]:
    """What img2dataset (or `clipkit shards pack`) wrote of a shard; empty where there is nothing.

    Raises:
        OSError, ValueError: The file is there, but cannot be read, or holds no JSON object.
    """
    path = stats_path(shard)
    return _read_object(path) if path.is_file() else {}


def count_faults(shard: Path, samples: int) -> Iterator[tuple[str, str]]:
    """Reason and detail of each difference.

    Args:
        shard: The tar file.
        samples: How many it holds, with those that are left out.
    """
    said: dict[str, Any] = {}
    try:
        said[f"{shard.stem}_stats.json"] = read_stats(shard).get("successes")
    except (OSError, ValueError) as error:
        yield "invalid stats", f"{shard.stem}_stats.json: {error}"
    sizes = shard.with_name("sizes.json")
    try:
        status = sizes.stat()
        said["sizes.json"] = _read_sizes(sizes, status.st_mtime_ns, status.st_size).get(shard.name)
    except OSError:
        pass
    except ValueError as error:
        yield "invalid stats", f"sizes.json: {error}"
    for name, number in said.items():
        if isinstance(number, int) and number != samples:
            yield "number of samples", f"{name} says {number}, the shard holds {samples}"


@lru_cache(maxsize=4)
def _read_sizes(path: Path, *_: int) -> dict[str, Any]:
    """`sizes.json`, read once for all shards of a folder and not once for each."""
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"holds {type(found).__name__}, expected an object")
    return found
