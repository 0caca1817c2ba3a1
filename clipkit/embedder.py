"""`Embedder`: pictures and texts in, unit vectors out.

The plain way to use a model: lists of whatever people have (files, bytes, pictures, strings) become float32
numpy rows, in batches, without gradients, each checked to be finite. A fault names the element of the list
that caused it.

Shapes: n inputs, D embedding dimension, S picture side, L tokens.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import ClipkitError, ConfigError, InputError
from clipkit.images import MAX_BYTES, MAX_PIXELS, ImageInput, decode_image
from clipkit.models import DualEncoder, load_model


class Embedder:
    """Embeds pictures and texts with one model.

    Args:
        model: A model, or what `load_model` takes.
        device: "cpu", "cuda", …; None leaves a given model where it is, and puts a loaded one on a GPU if
            there is one.
        batch_size: Inputs that go through the model at once.
        max_pixels, max_bytes: Limits of encoded pictures; see `decode_image`.

    Raises:
        NotFoundError, ArtifactError, DependencyError: As `load_model`.
        ConfigError: `batch_size` is below 1, or there is no such device.
    """

    def __init__(
        self,
        model: DualEncoder | str | Path,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        *,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(model, DualEncoder):
            self.model = model if device is None else model.to(device)
        else:
            self.model = load_model(model, device if device is not None else "auto")
        self.batch_size = batch_size
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes

    @property
    def dim(self) -> int:
        """The embedding dimension D."""
        return self.model.dim

    def images(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Unit vectors of pictures.

        Args:
            images: Encoded bytes, paths, Pillow pictures or uint8 arrays (H, W, 3), in any mixture.

        Returns:
            float32 (n, D).

        Raises:
            ImageError: A picture cannot be used; the message gives its position.
            NotFoundError: A path leads nowhere.
            InputError: `images` is not a list of the above.
        """
        if isinstance(images, bytes | bytearray | str | Path | Image.Image):
            raise InputError(f"expected a list of pictures, got {type(images).__name__}")
        batches = (
            torch.stack([self.prepare(image, _name(image, start + i)) for i, image in enumerate(batch)])
            for start, batch in self._batches(images)
        )
        return self._collect(batches, self.embed_pixels)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts.

        Args:
            texts: Non-empty strings; what exceeds the model's context is cut off.

        Returns:
            float32 (n, D).

        Raises:
            InputError: An element is no string, is empty or blank, or is no valid Unicode; the message gives
                its position.
        """
        check_texts(texts)
        batches = (self.model.tokenize(batch) for _, batch in self._batches(texts))
        return self._collect(batches, self.embed_ids)

    def prepare(self, image: ImageInput, name: str = "image") -> Tensor:
        """One picture decoded and resized for the model, uint8 (3, S, S). Raises: as `images`."""
        # a picture that is already in memory has been let in by whoever opened it
        max_pixels = sys.maxsize if isinstance(image, Image.Image) else self.max_pixels
        preprocess, max_bytes = self.model.preprocess, self.max_bytes
        decoded = decode_image(
            image, max_pixels=max_pixels, max_bytes=max_bytes, name=name, min_side=preprocess.min_side
        )
        return preprocess.uint8(decoded)

    def embed_pixels(self, pixels_N3SS: Tensor) -> np.ndarray:
        """Unit vectors, float32 (n, D), of one batch of pictures from `prepare`."""
        return self._run(self.model.encode_image, pixels_N3SS, "image")

    def embed_ids(self, ids_NL: Tensor) -> np.ndarray:
        """Unit vectors, float32 (n, D), of one batch of token ids from `model.tokenize`."""
        return self._run(self.model.encode_text, ids_NL, "text")

    def _batches(self, items: Sequence) -> Iterator[tuple[int, Sequence]]:
        for start in range(0, len(items), self.batch_size):
            yield start, items[start : start + self.batch_size]

    def _collect(self, batches: Iterator[Tensor], embed: Callable[[Tensor], np.ndarray]) -> np.ndarray:
        rows = [embed(batch) for batch in batches]
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), dtype=np.float32)

    def _run(self, encode: Callable[[Tensor], Tensor], batch: Tensor, what: str) -> np.ndarray:
        with _evaluating(self.model), torch.inference_mode():
            vectors_ND = encode(batch.to(self.model.device)).float().cpu().numpy()
        finite_N = np.isfinite(vectors_ND).all(axis=1)
        if not finite_N.all():
            position = int(np.flatnonzero(~finite_N)[0])
            raise ClipkitError(
                f"the model gives no finite embedding of {what} {position} of the batch",
                hint="its weights may be damaged or may have diverged in training",
            )
        return vectors_ND


def check_texts(texts: Sequence[str], what: str = "text") -> None:
    """Refuse what is no list of non-empty strings. Raises: InputError with the position."""
    if isinstance(texts, str | bytes):
        raise InputError(f"expected a list of strings, got one {type(texts).__name__}")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what} {position}: expected a string, got {type(text).__name__}")
        if not text.strip():
            raise InputError(f"{what} {position} is empty")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{what} {position} is no valid Unicode: {error.reason}") from error


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode; a model in training is handed back as it was."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def _name(image: ImageInput, position: int) -> str:
    """What to call a picture in messages."""
    return str(image) if isinstance(image, str | Path) else f"image {position}"
