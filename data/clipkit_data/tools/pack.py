"""A person's own pictures as shards: from a folder or a table, each picture checked before it is kept.

The pictures' bytes are kept as they are when they are JPEG, PNG or WebP (others become PNG), so packing loses
nothing. A row that cannot be used is left out, counted by reason, and listed in `faults.jsonl`. Shard k is
made from the rows k·N … (k+1)·N − 1 of the source: so several processes can make shards, and an interrupted
run can be continued (`clipkit_data.tools.job`).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from clipkit.errors import ConfigError, DataError, ImageError, InputError
from clipkit.files import atomic_write
from clipkit.images import decode_image
from clipkit_data.records import Record, RecordError, RecordSource, SampleFault, group_faults
from clipkit_data.shards.scan import picture_reason
from clipkit_data.shards.writing import entry, sample_key, shard_name, write_shard
from clipkit_data.sources import is_shards, open_source
from clipkit_data.tools.job import Advance, cores, jobs_or_cores, shards_job

FAULTS = "faults.jsonl"
_RESERVED = ("key", "status", "width", "height")  # written for each sample, as img2dataset does


def pack(
    source: str | Path,
    out: str | Path,
    *,
    per_shard: int = 10_000,
    jobs: int | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Write shards from a folder of pictures or a table; the folder appears whole or not at all.

    Args:
        source: A folder (caption from the `.txt` beside a picture, else from its file name) or a CSV, TSV,
            JSONL or Parquet file with columns `path, caption`; other columns go to the `.json`.
        out: The folder to make; it must not hold anything yet. After an interrupted run the same call makes
            only the shards that are missing.
        per_shard: Rows of the source per shard: the most samples that it can hold.
        jobs: Most processes; None is one per core. A single shard is made by threads.
        progress: Called with the number of rows just done.

    Returns:
        `{"samples", "shards", "faults": {reason: count}, "out"}`.

    Raises:
        NotFoundError, InputError: No such source, or no source.
        ArtifactError: `out` holds something already, or was begun from another source or with other settings.
        DataError: Nothing could be packed; the message counts the reasons.
    """
    if per_shard < 1:
        raise ConfigError(f"samples per shard must be at least 1, got {per_shard}")
    if is_shards(source):
        raise InputError(f"{source} is shards already", hint="pack takes a folder of pictures or a table")
    processes = jobs_or_cores(jobs)
    rows = open_source(source, captions=True)
    settings = {"command": "pack", "source": rows.fingerprint(), "per_shard": per_shard}
    with shards_job(out, settings) as job:
        count = -(-len(rows) // per_shard)
        threads = max(1, cores() // max(1, min(processes, count)))
        reports = job.run(_Pack(rows, per_shard, count, threads), count, jobs=processes, advance=progress)
        faults = [SampleFault(**fault) for report in reports for fault in report["faults"]]
        counts = group_faults([fault.reason for fault in faults])
        packed = sum(report["samples"] for report in reports)
        if not packed:
            job.discard()
            words = ", ".join(f"{reason} ×{count}" for reason, count in counts.items()) or "no rows"
            first = f"; the first: {faults[0].detail}" if faults else ""
            raise DataError(f"nothing could be packed from {source}: {words}{first}")
        write_faults(job.folder / FAULTS, faults)
    shards = sum(report["samples"] > 0 for report in reports)
    return {"samples": packed, "shards": shards, "faults": counts, "out": str(out)}


@dataclass(frozen=True)
class _Pack:
    """One shard from its rows of the source."""

    rows: RecordSource
    per_shard: int
    count: int
    threads: int

    def __call__(self, folder: Path, number: int, advance: Advance | None) -> dict[str, Any]:
        name = shard_name(number, self.count)
        span = range(number * self.per_shard, min((number + 1) * self.per_shard, len(self.rows)))
        faults: list[SampleFault] = []

        def samples() -> Iterator[dict[str, Any]]:
            for item in _ahead(self.rows, span, self.threads):
                if isinstance(item, SampleFault):
                    faults.append(item)
                else:
                    yield item
                if advance:
                    advance(1)

        entries = (
            entry(sample_key(name, place, self.per_shard), item) for place, item in enumerate(samples())
        )
        written = write_shard(entries, folder, name)
        return {"rows": len(span), "samples": written, "faults": [asdict(fault) for fault in faults]}


def write_faults(path: Path, faults: list[SampleFault]) -> None:
    """One JSON object per fault, in the source's order; no file when there is none."""
    if faults:
        lines = [asdict(fault) for fault in sorted(faults, key=lambda fault: fault.position)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(path, text.encode("utf-8", "backslashreplace"))


def _ahead(rows: RecordSource, span: Iterable[int], threads: int) -> Iterator[dict[str, Any] | SampleFault]:
    """The rows as samples, in order, a few read ahead by threads (Pillow decodes outside the GIL)."""
    waiting: deque[Future[dict[str, Any] | SampleFault]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for position in span:
            waiting.append(pool.submit(_sample, rows, position))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _sample(rows: RecordSource, position: int) -> dict[str, Any] | SampleFault:
    """One row as `write_shards` takes it, or why it is left out."""
    key = rows.key(position)
    try:
        record = rows[position]
        if not record.caption:
            raise RecordError(f"{key}: the caption is empty", "empty caption")
        return _checked(record)
    except ImageError as error:
        return SampleFault(position, key, picture_reason(error), error.message)
    except RecordError as error:
        return SampleFault(position, key, error.reason, error.message)


def _checked(record: Record) -> dict[str, Any]:
    """A record whose picture decodes, as a sample for a shard."""
    image = decode_image(record.image, name=record.key)
    data, extension = record.image, _kept_extension(record.image)
    if extension is None:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        data, extension = buffer.getvalue(), "png"
    meta = {f"source_{name}" if name in _RESERVED else name: value for name, value in record.meta.items()}
    meta |= {"path": record.key, "caption": record.caption, "width": image.width, "height": image.height}
    try:
        json.dumps(meta, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # a file name in another encoding, half of a surrogate pair
        raise RecordError(f"{record.key!r}: a name or text is not Unicode", "text is not Unicode") from error
    return {"image": data, "ext": extension, "caption": record.caption, "json": meta}


def _kept_extension(data: bytes) -> str | None:
    """The extension of a format that is kept as it is."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
