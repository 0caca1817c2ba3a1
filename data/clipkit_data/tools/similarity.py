"""What a model says of samples: how well a caption fits its picture, which pictures are nearly equal.

The samples are embedded into an embeddings folder, part by part, so that an interrupted run goes on where it
stopped. Its rows are float16: similarities are good to three digits.

Shapes: N samples, D embedding dimension, B rows of a block.

Reference: Schuhmann et al. 2021, "LAION-400M" (captions kept by their CLIP score).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clipkit.index.engines import load_faiss
from clipkit.models import DualEncoder
from clipkit_data.embedding import embed
from clipkit_data.records import Record, RecordSource

_BLOCK = 1024
_ROUNDING = 1e-6  # equal vectors have a float32 inner product of 1, give or take this


class Subset:
    """Some samples of a source as a source.

    Args:
        source: Where they come from.
        positions_N: Which ones, int64 (N,).
    """

    def __init__(self, source: RecordSource, positions_N: np.ndarray) -> None:
        self.source, self.positions_N, self.name = source, positions_N, source.name

    @property
    def has_captions(self) -> bool:
        """Whether the source's samples carry captions."""
        return self.source.has_captions

    def key(self, position: int) -> str:
        """The key of the sample at a position of the subset."""
        return self.source.key(int(self.positions_N[position]))

    def __len__(self) -> int:
        return len(self.positions_N)

    def __getitem__(self, position: int) -> Record:
        """The record at a position of the subset. Raises: RecordError."""
        return self.source[int(self.positions_N[position])]

    def fingerprint(self) -> str:
        """SHA-256 over the source's fingerprint and the positions."""
        chosen = self.positions_N.astype("<i8").tobytes()
        return hashlib.sha256(self.source.fingerprint().encode() + chosen).hexdigest()


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a subset.

    Args:
        positions_N: Positions in the source of the samples that could be embedded, int64 (N,).
        images_ND: float32, L2-normalised.
        score_N: Cosine of picture and caption, float32 (N,); NaN where there is no caption.
        faults: `position` in the source, `reason` and `detail` of each sample that could not be embedded.
    """

    positions_N: np.ndarray
    images_ND: np.ndarray
    score_N: np.ndarray
    faults: list[dict[str, Any]]


def embed_subset(
    model: DualEncoder,
    subset: Subset,
    folder: Path,
    *,
    progress: Callable[[int], Any] | None = None,
) -> Embedded:
    """Embed the pictures and captions of a subset into an embeddings folder, and read that.

    Args:
        model: The model, on the device where it shall run.
        subset: The samples.
        folder: The embeddings folder; an unfinished one of the same model and samples is continued.
        progress: Called with the number of samples just done.
    """
    embed(model, subset, folder, thumbnail_size=0, progress=progress)
    rows, images, scores = [], [], []
    for path in sorted((folder / "metadata").glob("*.parquet")):
        number = path.stem.removeprefix("metadata_")
        names = ["id", *(["caption"] if subset.has_captions else [])]
        table = pq.read_table(path, columns=names)
        images_ND = _unit(np.load(folder / f"img_emb/img_emb_{number}.npy"))
        rows.append(table.column("id").to_numpy())
        images.append(images_ND)
        score_N = np.full(len(images_ND), np.nan, dtype=np.float32)
        if subset.has_captions:
            texts_ND = _unit(np.load(folder / f"text_emb/text_emb_{number}.npy"))
            said_N = np.array([bool(caption) for caption in table.column("caption").to_pylist()], dtype=bool)
            score_N[said_N] = np.einsum("nd,nd->n", images_ND[said_N], texts_ND[said_N])
        scores.append(score_N)
    path = folder / "faults.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []  # text has more ends of lines
    faults = [json.loads(line) for line in lines]
    for fault in faults:
        fault["position"] = int(subset.positions_N[fault["position"]])
    chosen_N = subset.positions_N[np.concatenate(rows).astype(np.int64)]
    return Embedded(chosen_N, np.concatenate(images), np.concatenate(scores), faults)


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32: float16 had rounded them."""
    vectors_ND = vectors_ND.astype(np.float32)
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)


def near_duplicates(
    images_ND: np.ndarray, threshold: float, progress: Callable[[int], Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """For each picture the earlier one that it nearly repeats, by an exact search.

    A picture is kept when its cosine with every picture kept before it is below the threshold.

    Args:
        images_ND: float32 (N, D), L2-normalised.
        threshold: Cosine from which on two pictures count as one.
        progress: Called with the number of pictures just compared.

    Returns:
        int64 (N,), the row of the kept picture that is most like it, −1 for a picture that is kept itself;
        float32 (N,), their cosine.

    Raises:
        DependencyError: faiss is missing.
    """
    count, dim = images_ND.shape
    index = load_faiss().IndexFlatIP(dim)
    kept: list[int] = []
    of_N, cosine_N = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.float32)
    for start in range(0, count, _BLOCK):
        block_BD = np.ascontiguousarray(images_ND[start : start + _BLOCK])
        best_B, nearest_B = np.full(len(block_BD), -np.inf, dtype=np.float32), np.zeros(len(block_BD), int)
        if kept:
            scores_B1, rows_B1 = index.search(block_BD, 1)
            best_B, nearest_B = scores_B1[:, 0], np.array(kept)[rows_B1[:, 0]]
        inner_BB = block_BD @ block_BD.T
        new: list[int] = []
        for row in range(len(block_BD)):
            if new and inner_BB[row, new].max() > best_B[row]:
                place = new[int(inner_BB[row, new].argmax())]
                best_B[row], nearest_B[row] = inner_BB[row, place], start + place
            if best_B[row] >= threshold - _ROUNDING:
                of_N[start + row], cosine_N[start + row] = nearest_B[row], best_B[row]
            else:
                new.append(row)
        kept += [start + row for row in new]
        index.add(block_BD[new])
        if progress:
            progress(len(block_BD))
    return of_N, cosine_N
