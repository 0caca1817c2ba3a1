"""Pictures and captions to an embeddings folder, part by part.

The folder has clip-retrieval's names and shapes, so that its tools can read it, and a manifest that
clip-retrieval passes over. A part is a fixed range of the source. Its files are written to temporary names
and renamed, its marker last: after a kill, a rerun keeps every finished part and makes the rest; the manifest
comes at the very end, so an unfinished folder is never taken for a finished one.

    img_emb/img_emb_0.npy      float16 (rows, D), L2-normalised      text_emb/text_emb_0.npy  the same
    metadata/metadata_0.parquet  image_path, caption, the flattened .json, id
    thumbnails/thumbnails_0.parquet  id, image (WebP)      parts/part_0.json  the marker      job.json
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import ArtifactError, ConfigError, DataError, ImageError, MismatchError
from clipkit.files import MANIFEST, atomic_write, read_manifest, sha256_file, write_manifest
from clipkit.images import decode_image, over_white
from clipkit.models import DualEncoder, load_model
from clipkit_data.batches.content import Content, Pictures
from clipkit_data.batches.lost_workers import explaining_lost_workers
from clipkit_data.batches.reads import content_of
from clipkit_data.batches.workers import in_workers
from clipkit_data.metadata import metadata_table, table_bytes, thumbnails_table
from clipkit_data.records import Record, RecordError, RecordSource, SampleFault, group_faults
from clipkit_data.shards.scan import picture_reason
from clipkit_data.sources import open_source

KIND = "embeddings"
_JOB = "job.json"
_WEBP = {"format": "WEBP", "quality": 85, "method": 2}


@dataclass
class _Rows:
    """Consecutive rows of the source, decoded; faulty ones left out."""

    images: Tensor
    records: list[Record] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    faults: list[SampleFault] = field(default_factory=list)


class _Decoder:
    """The rows of a range (start, stop): what a worker runs."""

    def __init__(self, source: RecordSource, content: Content, thumbnail_size: int) -> None:
        self.source, self.content, self.thumbnail_size = source, content, thumbnail_size

    def make(self, span: tuple[int, int]) -> _Rows:
        """Those rows."""
        rows, images = _Rows(self.content.stack([])), []
        for position in range(*span):
            key = self.source.key(position)
            try:
                record = self.source[position]
                pixels, shown = self._read(record, key)
            except ImageError as error:
                rows.faults.append(SampleFault(position, key, picture_reason(error), error.message))
                continue
            except RecordError as error:
                rows.faults.append(SampleFault(position, key, error.reason, error.message))
                continue
            images.append(pixels)
            rows.positions.append(position)
            rows.records.append(Record(record.id, record.key, b"", record.caption, record.meta))
            if self.thumbnail_size:
                rows.thumbnails.append(_thumbnail(shown, self.thumbnail_size))
        rows.images = self.content.stack(images)
        return rows

    def _read(self, record: Record, key: str) -> tuple[Tensor, Image.Image]:
        """What the model sees of a record, and the picture to show of it: of a clip its middle frame."""
        if isinstance(self.content, Pictures):
            preprocess = self.content.preprocess
            image = decode_image(record.image, name=key, alpha=True, min_side=preprocess.min_side)
            return preprocess.uint8(over_white(image)), image
        clip_F3SS = self.content.load(record, None)
        return clip_F3SS, Image.fromarray(clip_F3SS[len(clip_F3SS) // 2].permute(1, 2, 0).numpy())


def _thumbnail(image: Image.Image, size: int) -> bytes:
    """The picture as WebP, its longest side at most `size` pixels."""
    small, buffer = image.copy(), BytesIO()
    small.thumbnail((size, size))
    small.save(buffer, **_WEBP)
    return buffer.getvalue()


@explaining_lost_workers()
def embed(
    model: DualEncoder | str | Path,
    source: str | Path | RecordSource,
    out: str | Path,
    *,
    batch_size: int = 64,
    thumbnail_size: int = 256,
    part_rows: int = 100_000,
    workers: int | None = None,
    device: str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Embed every picture of a source, and its caption where it has one.

    Args:
        model: A model, or a name or folder for `load_model`.
        source: Shards, a folder of pictures or a table (see `clipkit_data.sources`), or one that is open.
        out: The embeddings folder. An unfinished one of the same job is continued, a finished one returned.
        batch_size: Pictures per forward pass.
        thumbnail_size: Longest side of the thumbnails, pixels; 0 writes none.
        part_rows: Rows of the source per part.
        workers: Processes that decode; by default a few when the source is large.
        device: Where the model runs.
        progress: Called with the number of rows just done.

    Returns:
        The manifest: kind, model, source, rows, parts, faults by reason, SHA-256 of the files.

    Raises:
        MismatchError: `out` was begun with another model, source or setting.
        ArtifactError: `out` holds something else.
        DataError: Not one picture could be embedded.
    """
    sizes = (
        ("batch size", batch_size, 1),
        ("rows of a part", part_rows, 1),
        ("thumbnail size", thumbnail_size, 0),
    )
    for what, size, least in sizes:
        if size < least:
            raise ConfigError(f"{what} must be at least {least}, got {size}")
    name = "in memory" if isinstance(model, DualEncoder) else str(model)
    rows = open_source(source) if isinstance(source, str | Path) else source
    encoder = model if isinstance(model, DualEncoder) else load_model(model, device)
    job = _Job(encoder, rows, Path(out), thumbnail_size=thumbnail_size, part_rows=part_rows)
    finished = job.begin()
    if finished is not None:
        if progress:
            progress(len(rows))
        return finished
    training = encoder.training
    encoder.eval()
    try:
        job.run(batch_size, _default_workers(len(rows)) if workers is None else workers, progress)
    finally:
        encoder.train(training)
    described = {"name": rows.name, "samples": len(rows), "fingerprint": job.wanted["source"]}
    return job.finish(name, described)


def _default_workers(rows: int) -> int:
    return 0 if rows < 512 else min(4, max(1, (os.cpu_count() or 1) - 1))


class _Job:
    """One embeddings folder in the making."""

    def __init__(
        self, model: DualEncoder, source: RecordSource, out: Path, *, thumbnail_size: int, part_rows: int
    ) -> None:
        self.model, self.source, self.out = model, source, out
        self.thumbnail_size = thumbnail_size
        self.texts = source.has_captions
        self.spans = [
            (start, min(start + part_rows, len(source))) for start in range(0, len(source), part_rows)
        ]
        self.digits = len(str(len(self.spans)))  # as clip-retrieval pads: 10 parts are 00 … 09
        self.wanted: dict[str, Any] = {
            "model": model.fingerprint,
            "source": source.fingerprint(),
            "part_rows": part_rows,
            "thumbnail_size": thumbnail_size,
        }

    def begin(self) -> dict[str, Any] | None:
        """Make or take up the folder; the manifest when there is nothing left to do."""
        path = self.out / _JOB
        if self.out.exists() and not path.is_file() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ArtifactError(f"{self.out} already exists", hint="choose another folder or remove this one")
        if not path.is_file():
            atomic_write(path, json.dumps(self.wanted, indent=2) + "\n")
            return None
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged: {error}", hint="remove the folder") from error
        other = [key for key, value in self.wanted.items() if begun.get(key) != value]
        if other:
            raise MismatchError(
                f"{self.out} was begun with another {' and '.join(other).replace('_', ' ')}",
                hint="choose another folder or remove this one",
            )
        for leftover in self.out.rglob(".*"):  # temporary files of a process that was killed
            if leftover.is_file():
                leftover.unlink()
        return read_manifest(self.out, KIND) if (self.out / MANIFEST).is_file() else None

    def _files(self, part: int) -> dict[str, Path]:
        """The files of a part."""
        number, names = f"{part:0{self.digits}d}", {"img_emb": "npy", "metadata": "parquet"}
        if self.texts:
            names["text_emb"] = "npy"
        if self.thumbnail_size:
            names["thumbnails"] = "parquet"
        return {name: self.out / name / f"{name}_{number}.{suffix}" for name, suffix in names.items()}

    def _marker(self, part: int) -> Path:
        return self.out / "parts" / f"part_{part:0{self.digits}d}.json"

    def done(self, part: int) -> dict[str, Any] | None:
        """The marker of a part that is finished and whole."""
        try:
            marker = json.loads(self._marker(part).read_text(encoding="utf-8"))
            whole = all(
                sha256_file(path) == marker["files"][name] for name, path in self._files(part).items()
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return marker if whole else None

    def run(self, batch_size: int, workers: int, progress: Callable[[int], Any] | None) -> None:
        """Make every part that is not finished."""
        missing = []
        for part, (start, stop) in enumerate(self.spans):
            if self.done(part) is None:
                missing.append(part)
            elif progress:
                progress(stop - start)
        batches: dict[int, list[tuple[int, int]]] = {}
        for part in missing:
            first, stop = self.spans[part]
            starts = range(first, stop, batch_size)
            batches[part] = [(start, min(start + batch_size, stop)) for start in starts]
        decoder = _Decoder(self.source, content_of(self.model), self.thumbnail_size)
        spans = [span for part in missing for span in batches[part]]
        ready = in_workers(decoder.make, spans, workers=workers if spans else 0)
        for part in missing:
            self._write(part, (next(ready) for _ in batches[part]), progress)

    @torch.inference_mode()
    def _write(self, part: int, batches: Iterator[_Rows], progress: Callable[[int], Any] | None) -> None:
        """Embed one part and write its files, the marker last."""
        image_parts, text_parts, records, ids, thumbnails, faults = [], [], [], [], [], []
        for rows in batches:
            if rows.records:
                image_parts.append(self._half(self.model.encode_image(rows.images.to(self.model.device))))
                if self.texts:
                    tokens = self.model.tokenize([record.caption or "" for record in rows.records])
                    text_parts.append(self._half(self.model.encode_text(tokens.to(self.model.device))))
            records += rows.records
            ids += rows.positions
            thumbnails += rows.thumbnails
            faults += [asdict(fault) for fault in rows.faults]
            if progress:
                progress(len(rows.records) + len(rows.faults))
        content = {
            "img_emb": _npy(image_parts, self.model.dim),
            "metadata": table_bytes(metadata_table(records, ids, captions=self.texts)),
        }
        if self.texts:
            content["text_emb"] = _npy(text_parts, self.model.dim)
        if self.thumbnail_size:
            content["thumbnails"] = table_bytes(thumbnails_table(ids, thumbnails))
        digests = {}
        for name, path in self._files(part).items():
            atomic_write(path, content[name])
            digests[name] = sha256_file(path)
        marker = {"rows": len(ids), "span": self.spans[part], "files": digests, "faults": faults}
        atomic_write(self._marker(part), json.dumps(marker, ensure_ascii=False) + "\n")

    @staticmethod
    def _half(features_ND: Tensor) -> np.ndarray:
        return features_ND.cpu().numpy().astype(np.float16)

    def finish(self, name: str, source: dict[str, Any]) -> dict[str, Any]:
        """Write the list of faults and the manifest."""
        markers = [self.done(part) for part in range(len(self.spans))]
        whole = [marker for marker in markers if marker is not None]
        if len(whole) < len(markers):
            raise ArtifactError(f"{self.out} was changed while it was written", hint="run the command again")
        faults = [asdict(fault) for fault in getattr(self.source, "faults", [])]
        faults += [fault for marker in whole for fault in marker["faults"]]
        counts = group_faults([fault["reason"] for fault in faults])
        total = sum(marker["rows"] for marker in whole)
        if not total:
            words = ", ".join(f"{reason} ×{count}" for reason, count in counts.items())
            raise DataError(f"no picture of {source['name']} could be embedded: {words or 'there is none'}")
        if faults:
            lines = "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults)
            atomic_write(self.out / "faults.jsonl", lines)
        bias = self.model.bias
        model = {
            "name": name,
            "fingerprint": self.model.fingerprint,
            "dim": self.model.dim,
            "scale": float(self.model.scale.detach()),
            "bias": None if bias is None else float(bias.detach()),
            "scoring": self.model.scoring,
        }
        parts = [{"rows": marker["rows"]} for marker in whole]
        return write_manifest(
            self.out, KIND, model=model, source=source, rows=total, parts=parts, faults=counts
        )


def _npy(parts: list[np.ndarray], dim: int) -> bytes:
    """Rows as the bytes of a `.npy` file."""
    buffer = BytesIO()
    np.save(buffer, np.concatenate([np.empty((0, dim), dtype=np.float16), *parts]))
    return buffer.getvalue()
