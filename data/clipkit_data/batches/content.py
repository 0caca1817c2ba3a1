"""What becomes of a sample's content: how one is read from its record, and how many make a batch.

Everything around it (order, spares, quarantine, workers, captions, labels) is the same for pictures, clips,
graphs and texts; a `Content` is all that differs.

Shapes: B samples, S side in pixels.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clipkit.decode import Crop, CropOf, read_picture
from clipkit.images import Preprocess
from clipkit_data.records import Record, RecordError


class Content(Protocol):
    """Reads one kind of content. Instances travel to loader workers."""

    def load(self, record: Record, crop: CropOf | None) -> Any:
        """One sample's content.

        Args:
            record: The sample.
            crop: The box to cut out of each picture; None takes what the model's preprocessing does.

        Raises:
            ImageError: A picture cannot be used.
            RecordError: Anything else that makes the sample unusable, with a short fixed reason.
        """
        ...

    def stack(self, items: Sequence[Any]) -> Any:
        """What a batch holds of several samples, also of none."""
        ...


class Pictures:
    """Pictures as a model wants to see them.

    Args:
        preprocess: The model's; only its resizing is done here.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def load(self, record: Record, crop: CropOf | None = None) -> Tensor:
        """uint8 (3, S, S). Raises: ImageError; RecordError where the sample holds no picture."""
        if not record.image:
            raise RecordError(f"{record.key}: the sample holds no picture", "missing picture")
        return read_picture(record.image, self.preprocess, name=record.key, crop=crop)

    def stack(self, items: Sequence[Tensor]) -> Tensor:
        """uint8 (B, 3, S, S)."""
        side = self.preprocess.size
        return torch.stack(list(items)) if items else torch.zeros(0, 3, side, side, dtype=torch.uint8)


class WholePictures:
    """Pictures to cut views from: nothing is cut off, both sides are squashed to S.

    A sample is its pixels and the picture's width / height: crops drawn with that (`augment`'s `ratio_N`) are
    those of the picture as it was, and squares again.

    Args:
        preprocess: The model's, with the side S to load at.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.pictures = Pictures(preprocess)

    def load(self, record: Record, crop: CropOf | None = None) -> tuple[Tensor, float]:
        """uint8 (3, S, S), and width / height of the picture, or of `crop`. Raises: as `Pictures.load`."""
        box = _Box(crop)
        return self.pictures.load(record, box), box.ratio

    def stack(self, items: Sequence[tuple[Tensor, float]]) -> Tensor:
        """uint8 (B, 3, S, S)."""
        return self.pictures.stack([pixels for pixels, _ in items])

    def ratios(self, items: Sequence[tuple[Tensor, float]]) -> Tensor:
        """Width / height of each picture, float64 (B,)."""
        return torch.tensor([ratio for _, ratio in items], dtype=torch.float64)


class _Box:
    """A box to cut out, all of the picture by default; keeps its width / height in pixels."""

    def __init__(self, crop: CropOf | None) -> None:
        self.crop, self.ratio = crop, 1.0

    def __call__(self, width: int, height: int) -> Crop:
        box = self.crop(width, height) if self.crop else (0.0, 0.0, 1.0, 1.0)
        self.ratio = box[2] * width / (box[3] * height)
        return box


class Texts:
    """Nothing but the caption counts: pictures are not decoded."""

    def load(self, record: Record, crop: CropOf | None = None) -> None:
        return None

    def stack(self, items: Sequence[None]) -> Tensor:
        """uint8 (B, 0)."""
        return torch.zeros(len(items), 0, dtype=torch.uint8)


def content_for(what: Preprocess | Content) -> Content:
    """`Pictures` for a preprocessing; a content as it is."""
    return Pictures(what) if isinstance(what, Preprocess) else what
