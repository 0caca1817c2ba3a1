"""Semantic textual similarity: do cosines of sentences rank pairs as people did?

Only ranks count, so neither scale nor shift of the scores matters. A task of several files is judged in
SimCSE's "all" way: its pairs are put together and ranked once. A mean over the files' own figures is another
number, and papers differ in which they print.

Shapes: N pairs, D features.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit.models import Encoder

EmbedTexts = Callable[[Sequence[str]], Tensor]
"""From N sentences to unit features, float32 (N, D) on the CPU."""
_FIELDS = ("sentence1", "sentence2", "score")
_BATCH = 256


class ScoredPair(NamedTuple):
    """Two sentences and how alike people found them, on any scale."""

    sentence1: str
    sentence2: str
    score: float


def read_scored_pairs(path: Path | str) -> list[ScoredPair]:
    """The pairs of a file with the columns sentence1, sentence2 and score.

    Args:
        path: A `.tsv` or `.csv` with a line of column names, or a `.jsonl`, UTF-8. Tabs separate without
            quoting. Other columns are ignored.

    Raises:
        NotFoundError: No such file.
        DataError: A line is not such a pair, or there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no such file: {path}")
    pairs = list[ScoredPair]()
    try:
        for line, row in _rows(path):
            pairs.append(_pair(row, f"{path}, line {line}"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: line {len(pairs) + 1} or later cannot be read: {error}") from error
    if not pairs:
        raise DataError(f"{path} holds no pair of sentences")
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and mappings."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _json(line, f"{path}, line {number}")
        else:
            tabs = path.suffix == ".tsv"
            quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",", quoting=quoting)
            for row in reader:
                yield reader.line_num, row


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}") from error


def _pair(row: Any, where: str) -> ScoredPair:
    missing = [name for name in _FIELDS if not isinstance(row, dict) or row.get(name) in (None, "")]
    if missing:
        raise DataError(
            f"{where}: no {' and no '.join(missing)}", hint=f"the columns are {', '.join(_FIELDS)}"
        )
    try:
        score = float(row["score"])
    except (TypeError, ValueError):
        score = float("nan")
    if not np.isfinite(score):
        raise DataError(f"{where}: the score {row['score']!r} is no number")
    return ScoredPair(str(row["sentence1"]), str(row["sentence2"]), score)


def spearman(x: Any, y: Any) -> float:
    """Rank correlation of two lists of numbers; equal values share the mean of their ranks.

    Args:
        x: (N,) numbers, N ≥ 2.
        y: (N,) numbers.

    Returns:
        In [−1, 1].

    Raises:
        InputError: Lengths differ, fewer than 2, not finite, or all of one list are equal.
    """
    values = [np.asarray(value, dtype=np.float64) for value in (x, y)]
    if values[0].ndim != 1 or values[0].shape != values[1].shape or len(values[0]) < 2:
        raise InputError(f"two lists of one length ≥ 2 are needed, got {values[0].shape}, {values[1].shape}")
    if not all(np.isfinite(value).all() for value in values):
        raise InputError("a value is nan or infinite")
    for name, value in zip(("first", "second"), values, strict=True):
        if (value == value[0]).all():
            raise InputError(f"all values of the {name} list are equal: they rank nothing")
    return float(np.corrcoef(rankdata(values[0]), rankdata(values[1]))[0, 1])


@torch.inference_mode()
def embed_texts(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Unit features of sentences, float32 (N, D) on the CPU; each distinct sentence is encoded once.

    Raises:
        InputError: The encoder takes no texts.
    """
    if encoder.tokenizer is None:
        raise InputError(f"sentences need a text encoder, this one encodes {encoder.modality}s")
    # sentences of like length together: less padding
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    was_training = encoder.training
    encoder.eval()
    try:
        parts = []
        for start in range(0, len(distinct), _BATCH):
            ids_NL = encoder.trim(encoder.tokenizer.encode(distinct[start : start + _BATCH]))
            parts.append(encoder.encode(ids_NL.to(encoder.device)).cpu())
    finally:
        encoder.train(was_training)
    place = {text: number for number, text in enumerate(distinct)}
    return F.normalize(torch.cat(parts), dim=1)[[place[text] for text in texts]]


def sts(embed: EmbedTexts, tasks: Mapping[str, Sequence[ScoredPair]]) -> dict[str, float]:
    """Spearman's correlation of cosines with people's scores, for each task, and their mean.

    Args:
        embed: What gives the features, such as `partial(embed_texts, encoder)`.
        tasks: Pairs by name; those of a task of several files are all together.

    Returns:
        `{task: correlation, …, "mean": …}`, in [−1, 1]; papers print them times 100.

    Raises:
        InputError: No task, or all cosines or all scores of a task are equal.
    """
    if not tasks:
        raise InputError("there is no task to judge on")
    figures = {}
    for name, pairs in tasks.items():
        x_ND, y_ND = embed([pair.sentence1 for pair in pairs]), embed([pair.sentence2 for pair in pairs])
        cosine_N = (x_ND * y_ND).sum(dim=1)
        try:
            figures[name] = spearman(cosine_N.numpy(), [pair.score for pair in pairs])
        except InputError as error:
            raise InputError(f"{name}: {error.message} (first: cosines, second: scores)") from error
    return figures | {"mean": float(np.mean(list(figures.values())))}
