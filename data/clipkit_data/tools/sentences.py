"""Pairs of captions with a graded similarity, made of what is known of the samples.

People's scores of sentence pairs (the STS tasks) are large downloads. Samples that carry lists of keywords
have a grade of their own: how many keywords two of them share. The pairs are a function of the samples and
the seed, and have the form that `clipkit_training.judge.sentences` reads: sentence1, sentence2, score.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipkit.errors import DataError
from clipkit.files import atomic_write
from clipkit_data.records import Record

COLUMNS = ("sentence1", "sentence2", "score")


class GradedPair(NamedTuple):
    """Two captions, and the share of their keywords that both have, in [0, 1]."""

    sentence1: str
    sentence2: str
    score: float


def graded_pairs(
    records: Iterable[Record], field: str = "keywords", *, count: int = 10_000, seed: int = 0
) -> list[GradedPair]:
    """Pairs of different captions, drawn at random, scored by the Jaccard index of their keywords.

        score = |A ∩ B| / |A ∪ B|

    Half of the pairs are drawn from those that share a keyword, as far as there are so many: of two samples
    drawn at random most share none, and a grade that is nearly always 0 ranks little.

    Args:
        records: Samples with a caption; those without a list of texts in the field are passed over.
        field: Metadata field that holds a list of keywords.
        count: Pairs at most.
        seed: Of the draw.

    Raises:
        DataError: Fewer than two samples have keywords.
    """
    found = {r.caption: _words(r, field) for r in records if r.caption and _words(r, field)}
    captions, keywords = list(found), list(found.values())
    if len(captions) < 2:
        raise DataError(
            f"pairs need two captions with a list of texts in {field!r}, there are {len(captions)}"
        )
    words = {word: place for place, word in enumerate(sorted(set().union(*keywords)))}
    has_NW = np.zeros((len(captions), len(words)), dtype=np.float32)
    for row, own in enumerate(keywords):
        has_NW[row, [words[word] for word in own]] = 1
    shared_NN, sizes_N = has_NW @ has_NW.T, has_NW.sum(axis=1)
    scores_NN = shared_NN / (sizes_N[:, None] + sizes_N - shared_NN)
    first, second = np.triu_indices(len(captions), k=1)
    scores = scores_NN[first, second]
    generator = np.random.Generator(np.random.Philox(seed))
    alike, others = (generator.permutation(np.flatnonzero(part)) for part in (scores > 0, scores == 0))
    half = min(len(alike), max(count // 2, count - len(others)))
    chosen = np.sort(np.concatenate([alike[:half], others[: count - half]]))
    return [
        GradedPair(captions[first[place]], captions[second[place]], float(scores[place])) for place in chosen
    ]


def _words(record: Record, field: str) -> set[str]:
    value = record.meta.get(field)
    return {word for word in value if isinstance(word, str)} if isinstance(value, list) else set()


def write_pairs(path: Path, pairs: Iterable[GradedPair]) -> None:
    """Write pairs as a table with tabs (`.tsv`); tabs and line breaks inside a sentence become spaces."""
    rows = [(" ".join(a.split()), " ".join(b.split()), f"{score:.6g}") for a, b, score in pairs]
    atomic_write(path, "".join("\t".join(row) + "\n" for row in (COLUMNS, *rows)))
