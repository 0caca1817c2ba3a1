"""Clips: F frames of each sample, whatever it is made of: numbered pictures, a video file, or one picture.

The frames taken are those at the middles of F equal parts of the clip, so that they span it however long it
is. By the same rule a clip of fewer frames shows each for an equal share of the time, and a single picture is
a clip that stands still. A random crop is the sample's: all frames are cut alike.

Shapes: B samples, F frames, H × W pixels of a video, S side in pixels.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from clipkit.decode import CropOf, fit_pixels, read_picture
from clipkit.encoded import MAX_PIXELS
from clipkit.errors import DependencyError
from clipkit.images import Preprocess
from clipkit_data.records import Record, RecordError
from clipkit_data.shards.sample import CLIP_EXTENSIONS

_FFMPEG = "install FFmpeg's libraries, version 4 to 9 (Debian: apt-get install ffmpeg)"


def frame_positions(available: int, frames: int) -> list[int]:
    """Which frames stand for a clip: those at the middles of equal parts of it.

    Args:
        available: Frames that the clip has, at least 1.
        frames: How many are wanted; where the clip has fewer, some are taken several times.

    References: Wang et al. 2016, "Temporal segment networks", section 3.1; at test time the middles.
    """
    return [(2 * part + 1) * available // (2 * frames) for part in range(frames)]


class Clips:
    """Clips as a model of video wants to see them.

    Args:
        preprocess: The model's; only its resizing is done here.
        frames: F, how many frames of each clip.
    """

    def __init__(self, preprocess: Preprocess, frames: int) -> None:
        self.preprocess, self.frames = preprocess, frames

    def load(self, record: Record, crop: CropOf | None = None) -> Tensor:
        """uint8 (F, 3, S, S).

        Raises:
            ImageError: A frame that is a picture cannot be used.
            RecordError: The sample holds neither pictures nor a clip ("missing clip"), or a video file that
                cannot be decoded ("clip damaged").
            DependencyError: Video files need torchcodec and FFmpeg's libraries.
        """
        if record.extension in CLIP_EXTENSIONS:
            return self._video(record, crop)
        pictures = record.frames or ((record.image,) if record.image else ())
        if not pictures:
            raise RecordError(f"{record.key}: the sample holds no frames, clip or picture", "missing clip")
        return self._at(
            len(pictures),
            lambda place: read_picture(
                pictures[place], self.preprocess, name=f"{record.key}: frame {place}", crop=crop
            ),
        )

    def stack(self, items: Sequence[Tensor]) -> Tensor:
        """uint8 (B, F, 3, S, S)."""
        side = self.preprocess.size
        empty = torch.zeros(0, self.frames, 3, side, side, dtype=torch.uint8)
        return torch.stack(list(items)) if items else empty

    def _at(self, available: int, read: Callable[[int], Tensor]) -> Tensor:
        """The frames at their positions, each read once."""
        places = frame_positions(available, self.frames)
        found = {place: read(place) for place in dict.fromkeys(places)}
        return torch.stack([found[place] for place in places])

    def _video(self, record: Record, crop: CropOf | None) -> Tensor:
        """Frames of a video file, one decoded picture in memory at a time."""
        try:
            decoder = _decoder_class()(record.image, device="cpu")
            size = decoder.metadata.width * decoder.metadata.height
            if size > MAX_PIXELS:
                raise RecordError(
                    f"{record.key}: its frames have {size:,} pixels, more than {MAX_PIXELS:,}",
                    "clip too large",
                )
            return self._at(
                len(decoder),
                lambda place: fit_pixels(
                    decoder.get_frame_at(place).data.permute(1, 2, 0).numpy(), self.preprocess, crop=crop
                ),
            )
        # torchcodec passes on whatever FFmpeg says, in errors of several kinds
        except (RuntimeError, ValueError, IndexError) as error:
            words = " ".join(str(error).split())
            if "load libtorchcodec" in words:
                raise DependencyError(
                    "torchcodec finds no FFmpeg to decode clips with", hint=_FFMPEG
                ) from error
            raise RecordError(
                f"{record.key}.{record.extension} cannot be decoded: {words[-200:]}", "clip damaged"
            ) from error


@cache
def _decoder_class() -> Any:
    """torchcodec's decoder. Raises: DependencyError where it is not installed."""
    try:
        return import_module("torchcodec.decoders").VideoDecoder
    except ImportError as error:
        raise DependencyError(
            "video files need torchcodec", hint=f"pip install 'clipkit[video]', and {_FFMPEG}"
        ) from error
