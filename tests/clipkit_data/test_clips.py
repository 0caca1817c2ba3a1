"""Clips: which frames stand for one, out of what they are read, and that all are changed alike."""

import io
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from clipkit.decode import read_picture
from clipkit.errors import DependencyError, ImageError
from clipkit.images import Preprocess
from clipkit_data.batches import clips
from clipkit_data.batches.clips import Clips, frame_positions
from clipkit_data.batches.loader import TrainBatches
from clipkit_data.batches.pairs import EvalBatches
from clipkit_data.dataset import ShardDataset
from clipkit_data.pictures.augment import AugmentConfig, augment
from clipkit_data.pictures.crop import CropConfig
from clipkit_data.pictures.views import ViewsConfig, ViewSpec, make_views
from clipkit_data.records import Record, RecordError

PREPROCESS = Preprocess(size=16, resize="squash")
STRONG = AugmentConfig(
    crop=0.3, flip=0.5, rotate=30, translate=0.2,
    brightness=0.3, contrast=0.3, hue=0.2, grayscale=0.3, blur=0.5,
)  # fmt: skip
WriteShard = Callable[..., Path]


def grey(level: int, side: int = 16) -> bytes:
    """A picture (PNG) of one level."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def clip_sample(key: str, levels: list[int], **more: bytes) -> dict[str, Any]:
    """A clip of numbered frames, its members in the order of their names."""
    names = sorted(str(number) for number in range(len(levels)))
    frames = {f"{name}.png": grey(levels[int(name)]) for name in names}
    return {"__key__": key, **frames, "txt": f"clip {key}".encode(), **more}


def levels_of(clip_F3SS: Tensor) -> list[int]:
    return clip_F3SS.flatten(1).float().mean(dim=1).round().int().tolist()


@given(st.integers(1, 500), st.integers(1, 64))
def test_frames_lie_in_the_middles_of_equal_parts(available: int, frames: int) -> None:
    places = frame_positions(available, frames)
    part = Fraction(available, frames)
    assert len(places) == frames
    for number, place in enumerate(places):
        assert place <= (number + Fraction(1, 2)) * part < place + 1
        assert number * part < place + 1
        assert place < (number + 1) * part
    counts = [places.count(place) for place in range(available)]
    if available >= frames:
        assert len(set(places)) == frames
    else:
        assert max(counts) - min(counts) <= 1
        assert places == sorted(places)


def test_some_positions_by_hand() -> None:
    assert frame_positions(8, 8) == list(range(8))
    assert frame_positions(8, 4) == [1, 3, 5, 7]
    assert frame_positions(9, 3) == [1, 4, 7]
    assert frame_positions(2, 4) == [0, 0, 1, 1]
    assert frame_positions(3, 1) == [1]
    assert frame_positions(1, 3) == [0, 0, 0]


def test_frame_ten_comes_after_frame_nine(write_shard: WriteShard) -> None:
    levels = [20 * number for number in range(12)]
    dataset = ShardDataset([write_shard("00000.tar", [clip_sample("a", levels)])])
    assert levels_of(Clips(PREPROCESS, 12).load(dataset[0])) == levels
    assert levels_of(Clips(PREPROCESS, 4).load(dataset[0])) == [levels[place] for place in (1, 4, 7, 10)]


def test_short_clips_are_repeated_and_a_picture_stands_still(write_shard: WriteShard) -> None:
    samples = [clip_sample("a", [10, 200]), {"__key__": "b", "png": grey(70), "txt": b"one picture"}]
    dataset, content = ShardDataset([write_shard("00000.tar", samples)]), Clips(PREPROCESS, 5)
    assert levels_of(content.load(dataset[0])) == [10, 10, 200, 200, 200]
    assert levels_of(content.load(dataset[1])) == [70] * 5
    pairs = next(iter(EvalBatches(dataset, content)))
    assert pairs.images.shape == (2, 5, 3, 16, 16)
    assert pairs.images.dtype == torch.uint8
    assert pairs.captions == ["clip a", "one picture"]
    assert content.stack([]).shape == (0, 5, 3, 16, 16)


def test_a_damaged_frame_leaves_its_clip_out_and_is_named(write_shard: WriteShard) -> None:
    broken = clip_sample("bad", [1, 2, 3])
    broken["1.png"] = broken["1.png"][:40]
    dataset = ShardDataset([write_shard("00000.tar", [broken, clip_sample("good", [4, 5, 6])])])
    with pytest.raises(ImageError, match="bad: frame 1"):
        Clips(PREPROCESS, 3).load(dataset[0])
    pairs = next(iter(EvalBatches(dataset, Clips(PREPROCESS, 3))))
    assert [record.key for record in pairs.records] == ["good"]
    assert [(fault.key, fault.reason) for fault in pairs.faults] == [("bad", "picture undecodable")]


def test_a_sample_without_content_is_no_clip() -> None:
    with pytest.raises(RecordError, match="holds no frames") as caught:
        Clips(PREPROCESS, 3).load(Record((0, 0), "words", b"", "a caption"))
    assert caught.value.reason == "missing clip"


def test_all_frames_are_cropped_alike(write_shard: WriteShard, picture: Callable[..., bytes]) -> None:
    frames = [picture(number, side=40) for number in range(3)]
    sample = {"__key__": "a", **{f"{number}.png": frame for number, frame in enumerate(frames)}, "txt": b"a"}
    dataset = ShardDataset([write_shard("00000.tar", [sample])])
    box = CropConfig(scale=(0.2, 0.4)).boxes(seed=1, epoch_n=np.array([0]), id_n=np.array([5]))[0]
    found = Clips(PREPROCESS, 3).load(dataset[0], box)
    expected = [read_picture(frame, PREPROCESS, crop=box(40, 40)) for frame in frames]
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, Clips(PREPROCESS, 3).load(dataset[0]))


def random_clips(count: int, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count * frames, 3, 5, 5, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, 24, mode="bilinear").to(torch.uint8)
    return fine.unflatten(0, (count, frames))


def test_each_frame_is_augmented_as_its_clip() -> None:
    images, ids = random_clips(5, 4), np.arange(5)
    keys: dict[str, Any] = {"seed": 3, "epoch_N": np.full(5, 2), "id_N": ids}
    found = augment(images, STRONG, size=20, **keys)
    assert found.shape == (5, 4, 3, 20, 20)
    for frame in range(4):
        assert torch.equal(found[:, frame], augment(images[:, frame], STRONG, size=20, **keys))
    still = augment(images[:, :1].expand(-1, 4, -1, -1, -1), STRONG, **keys)
    assert torch.equal(still, still[:, :1].expand_as(still))
    assert not torch.equal(still[:, 0], images[:, 0])
    assert augment(images[:0], STRONG, size=20, seed=3, epoch_N=ids[:0], id_N=ids[:0]).shape == (
        0,
        4,
        3,
        20,
        20,
    )


def test_views_of_clips_are_clips() -> None:
    images, ids = random_clips(3, 2), np.arange(3)
    views = ViewsConfig(views=(ViewSpec(augment=STRONG, size=12, count=2),))
    first, second = make_views(images, views, seed=0, epoch_N=ids * 0, id_N=ids)
    assert first.shape == second.shape == (3, 2, 3, 12, 12)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_clips_are_the_same_for_any_number_of_workers(
    write_shard: WriteShard, workers: int
) -> None:
    samples = [clip_sample(f"{number:03d}", [20 * number, 20 * number + 9]) for number in range(12)]
    dataset = ShardDataset([write_shard("00000.tar", samples)])
    batches = TrainBatches(
        [dataset], Clips(PREPROCESS, 2), None, batch_size=4, seed=1, workers=workers, augment=AugmentConfig()
    )
    found = next(iter(batches))
    assert found.images.shape == (4, 2, 3, 16, 16)
    order = found.index.tolist()
    assert [levels_of(clip) for clip in found.images] == [[20 * i, 20 * i + 9] for i in order]
    changed = found.augmented(STRONG, seed=1)
    assert changed.images.shape == found.images.shape


@pytest.fixture(scope="module")
def encode() -> Callable[..., bytes]:
    """Makes the bytes of a video of grey frames: `encode(levels, kind="mp4", side=32)`."""
    encoders = pytest.importorskip("torchcodec.encoders")

    def make(levels: list[int], kind: str = "mp4", side: int = 32) -> bytes:
        frames = torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side)
        return (
            encoders.VideoEncoder(frames.contiguous(), frame_rate=10).to_tensor(format=kind).numpy().tobytes()
        )

    try:
        make([0])
    except RuntimeError as error:
        if "load libtorchcodec" not in str(error):
            raise
        pytest.skip("torchcodec finds no FFmpeg: apt-get install ffmpeg")
    return make


@pytest.mark.parametrize("kind", ["mp4", "webm", "mov", "avi"])
def test_a_video_gives_the_middles_of_its_parts(
    write_shard: WriteShard, encode: Callable[..., bytes], kind: str
) -> None:
    levels = [10 * number for number in range(24)]
    sample = {"__key__": "a", kind: encode(levels, kind), "txt": b"getting brighter"}
    dataset = ShardDataset([write_shard("00000.tar", [sample])])
    for frames in (1, 4, 24, 30):
        found = levels_of(Clips(PREPROCESS, frames).load(dataset[0]))
        expected = [levels[place] for place in frame_positions(24, frames)]
        assert all(abs(a - b) <= 4 for a, b in zip(found, expected, strict=True))  # the codec loses a little


def test_a_video_frame_is_cut_and_resized_as_a_picture(encode: Callable[..., bytes]) -> None:
    axis = torch.arange(48, dtype=torch.uint8) * 5
    frames = axis.expand(1, 3, 64, 48).contiguous()
    encoder = pytest.importorskip("torchcodec.encoders").VideoEncoder(frames, frame_rate=10)
    data = encoder.to_tensor(format="mp4", crf=0, pixel_format="yuv444p").numpy().tobytes()
    buffer = io.BytesIO()
    Image.fromarray(frames[0].permute(1, 2, 0).numpy()).save(buffer, "PNG")
    for resize in ("squash", "shortest"):
        preprocess = Preprocess(size=16, resize=resize)
        box = CropConfig(scale=(0.2, 0.3)).boxes(seed=1, epoch_n=np.array([0]), id_n=np.array([5]))[0]
        for crop in (None, box):
            record = Record((0, 0), "a", data, "a", extension="mp4")
            video = Clips(preprocess, 1).load(record, crop)[0].int()
            still = read_picture(buffer.getvalue(), preprocess, crop=crop).int()
            assert (video - still).abs().max() <= 4


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_video_is_a_fault_and_the_others_are_read(
    write_shard: WriteShard, encode: Callable[..., bytes], damage: str
) -> None:
    good = encode([0, 100, 200])
    bad = {"cut": good[: len(good) // 2], "empty": b"", "noise": bytes(range(256)) * 8}[damage]
    samples = [{"__key__": key, "mp4": data, "txt": b"words"} for key, data in (("a", good), ("b", bad))]
    dataset = ShardDataset([write_shard("00000.tar", samples)])
    pairs = next(iter(EvalBatches(dataset, Clips(PREPROCESS, 2))))
    assert [record.key for record in pairs.records] == ["a"]
    assert [(fault.key, fault.reason) for fault in pairs.faults] == [("b", "clip damaged")]
    assert "b.mp4 cannot be decoded" in pairs.faults[0].detail


def test_a_video_without_torchcodec_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    clips._decoder_class.cache_clear()
    with pytest.raises(DependencyError, match=r"clipkit\[video\]"):
        Clips(PREPROCESS, 2).load(Record((0, 0), "a", b"data", "a", extension="mp4"))


def test_a_video_without_ffmpeg_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(data: bytes, device: str) -> None:
        raise RuntimeError("Could not load libtorchcodec. Likely causes: FFmpeg is not properly installed")

    monkeypatch.setattr(clips, "_decoder_class", lambda: refuse)
    with pytest.raises(DependencyError, match="apt-get install ffmpeg"):
        Clips(PREPROCESS, 2).load(Record((0, 0), "a", b"data", "a", extension="mp4"))
