"""Finding a sentence's other wording, such as its translation, among those of all samples.

What neighbours and probes ask of sentences, counted letters often answer too. They do not translate: another
language, or other words, is what shows that an encoder knows what was said.

Shapes: N samples.
"""

from collections.abc import Sequence

import torch

from clipkit.errors import DataError
from clipkit.metrics import retrieval_recall
from clipkit_data.batches.content import Texts
from clipkit_data.batches.pairs import Dataset, EvalBatches
from clipkit_data.captions import field_text
from clipkit_training.judge.sentences import EmbedTexts

KS = (1, 10)


def read_wordings(data: Dataset, field: str) -> list[tuple[str, str]]:
    """Caption and other wording of each sample that has both.

    Args:
        data: Samples with captions.
        field: Metadata field with the other wording; of a list of texts the first is taken.

    Raises:
        DataError: No sample has both: then the fields that there are are named.
    """
    records = [record for batch in EvalBatches(data, Texts()) for record in batch.records]
    both = [(record.caption or "", field_text(record.meta.get(field), 0.0)) for record in records]
    found = [(caption, other) for caption, other in both if caption and other]
    if not found:
        fields = sorted(set[str]().union(*(record.meta for record in records)))
        raise DataError(
            f"no sample has a caption and a text in the field {field!r}",
            hint=f"there are {', '.join(fields)}" if fields else "the samples have no metadata",
        )
    return found


def wordings_recall(embed: EmbedTexts, wordings: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Share of the captions whose other wording is among the k most similar of all, as "recall@k".

    Samples of one wording share it: each is a hit.
    """
    captions, others = zip(*wordings, strict=True)
    numbers = {other: number for number, other in enumerate(dict.fromkeys(others))}
    ids_N = torch.tensor([numbers[other] for other in others])
    distinct_M = torch.arange(len(numbers))
    return retrieval_recall(embed(captions), embed(list(numbers)), ids_N, distinct_M, ks=KS)
