"""Which words describe a picture in one draw: its caption, or a field of its `.json`.

A picture often has several descriptions (a name, keywords, a name in another language). Drawing one of them
by weight each time a sample comes up is augmentation for texts.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from clipkit.errors import ConfigError
from clipkit_data.keyed import Purpose, keyed_uniforms
from clipkit_data.records import Record

CAPTION = "caption"


class CaptionSampler:
    """Draws a sample's caption.

    Args:
        fields: Weight of each source: "caption" is the sample's `.txt`, any other name a field of its
            `.json` (a text, or a list of texts of which one is drawn). Where a field is missing or empty the
            `.txt` is taken.

    Raises:
        ConfigError: No field, or a weight that is not above 0.
    """

    draws = 2

    def __init__(self, fields: Mapping[str, float] | None = None) -> None:
        self.fields = dict(fields or {CAPTION: 1.0})
        for name, weight in self.fields.items():
            if not weight > 0:
                raise ConfigError(f"captions.{name}: the weight must be above 0, got {weight}")
        self._names = list(self.fields)
        self._bounds = list(accumulate(self.fields.values()))

    def draw(self, record: Record, uniforms: Sequence[float]) -> str:
        """One caption; `uniforms` are two numbers in [0, 1) that decide which."""
        place = bisect_right(self._bounds, uniforms[0] * self._bounds[-1])
        name = self._names[min(place, len(self._names) - 1)]
        text = "" if name == CAPTION else field_text(record.meta.get(name), uniforms[1])
        return text or record.caption or ""


def draw_captions(
    captions: CaptionSampler, records: Sequence[Record], seed: int, epoch_N: np.ndarray, id_N: np.ndarray
) -> list[str]:
    """One caption of each record, as (seed, epoch, sample id) says; epochs and ids are integers (N,)."""
    draws_N2 = keyed_uniforms(seed, Purpose.CAPTION, epoch_N, id_N, captions.draws).tolist()
    return [captions.draw(record, draw) for record, draw in zip(records, draws_N2, strict=True)]


def field_text(value: Any, uniform: float) -> str:
    """A field's text; of a list the element that `uniform` points at."""
    if isinstance(value, list):
        texts = [item for item in value if isinstance(item, str) and item.strip()]
        value = texts[int(uniform * len(texts))] if texts else ""
    return value.strip() if isinstance(value, str) else ""
