"""Pictures: what is accepted, what is refused and why, and pixels equal to open_clip's own transform."""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from pydantic import ValidationError

from clipkit.errors import ImageError, InputError, NotFoundError
from clipkit.images import CLIP_MEAN, CLIP_STD, Preprocess, decode_image
from clipkit.models.dual_encoder import ModelConfig

RNG = np.random.default_rng(0)


def picture(width: int = 20, height: int = 12, mode: str = "RGB") -> Image.Image:
    noise = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_accepts_the_five_formats_as_bytes_path_and_buffer(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(), kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), path, str(path)):
        image = decode_image(source)
        assert (image.mode, image.size) == ("RGB", (20, 12))


def test_accepts_pillow_pictures_and_arrays() -> None:
    image = picture()
    assert decode_image(image) is image
    array = np.asarray(image)
    assert np.array_equal(np.asarray(decode_image(array)), array)
    assert np.array_equal(np.asarray(decode_image(array[:, ::-1])), array[:, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB"])
def test_every_opaque_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = picture(mode=mode)
    decoded = decode_image(encoded(image, kind))
    assert decoded.mode == "RGB"
    if kind == "PNG":
        assert np.array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    data = encoded(clear if mode == "P" else clear.convert(mode), "GIF" if mode == "P" else "PNG")
    assert np.asarray(decode_image(data)).min() == 255
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.asarray(decode_image(half))[0, 0].tolist() == [127, 127, 127]


def test_transparent_colour_of_a_palette_and_of_grey() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode_image(encoded(image, "PNG", transparency=0)))
    assert pixels.tolist() == [[[255, 255, 255], [255, 0, 0]]]
    grey = encoded(Image.new("L", (1, 1), 7), "PNG", transparency=7)
    assert np.asarray(decode_image(grey)).tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 0x0100, 0x8000, 0xFFFF]], dtype=np.uint16)
    data = encoded(Image.fromarray(levels), "PNG")
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_applied_and_broken_exif_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(picture(20, 12), "JPEG", exif=exif)).size == (12, 20)
    assert decode_image(encoded(picture(20, 12), "JPEG", exif=b"Exif\0\0garbage")).size == (20, 12)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.5])
def test_truncated_is_undecodable(kind: str, part: float) -> None:
    data = encoded(picture(200, 200), kind)
    with pytest.raises(ImageError, match="cannot be decoded") as caught:
        decode_image(data[: max(12, int(len(data) * part))], name="sample 7")
    assert caught.value.reason == "undecodable"
    assert "sample 7" in str(caught.value)


def test_random_damage_never_escapes_as_another_error() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        data = encoded(picture(40, 40), kind)
        for _ in range(40):
            damaged = bytearray(data)
            for position in RNG.integers(0, len(data), 8):
                damaged[position] = RNG.integers(0, 256)
            with contextlib.suppress(ImageError):
                assert decode_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<html><body>404", "an HTML page"),
        (b"<svg xmlns='x'/>", "an SVG drawing"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"hello", "no picture"),
    ],
)
def test_other_content_is_named(data: bytes, what: str) -> None:
    with pytest.raises(ImageError, match=what) as caught:
        decode_image(data)
    assert caught.value.reason == "format"


def test_a_picture_in_a_refused_format_is_named() -> None:
    with pytest.raises(ImageError, match="a TIFF picture") as caught:
        decode_image(encoded(picture(), "TIFF"))
    assert caught.value.reason == "format"


def test_limits_of_bytes_and_pixels(tmp_path: Path) -> None:
    data = encoded(picture(20, 12), "PNG")
    for source in (data, decode_image(data), np.asarray(decode_image(data))):
        with pytest.raises(ImageError, match="20 × 12 pixels; at most 239") as caught:
            decode_image(source, max_pixels=239)
        assert caught.value.reason == "too_large"
    assert decode_image(data, max_pixels=240).size == (20, 12)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(ImageError, match="bytes; at most 10 ") as caught:
            decode_image(source, max_bytes=10)
        assert caught.value.reason == "too_large"


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT" + zlib.compress(bytes(1000))
    data += struct.pack(">I", len(idat) - 4) + idat + struct.pack(">I", zlib.crc32(idat))
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == "too_large"


def test_empty_missing_and_wrong_types(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(b"")
    assert caught.value.reason == "empty"
    with pytest.raises(NotFoundError, match="no such file"):
        decode_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="got int"):
        decode_image(3)  # type: ignore[arg-type]
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((3, 4, 4), np.uint8)):
        with pytest.raises(ImageError, match="must be uint8 of shape"):
            decode_image(wrong)
    with pytest.raises(ImageError) as caught:
        decode_image(np.zeros((0, 4, 3), np.uint8))
    assert caught.value.reason == "empty"


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(50, 37), (33, 64), (16, 16), (301, 200), (7, 90), (1, 1)])
def test_pixels_equal_open_clips_transform(resize: str, interpolation: str, size: tuple[int, int]) -> None:
    image = picture(*size)
    ours = Preprocess.model_validate({"size": 32, "resize": resize, "interpolation": interpolation})
    theirs: Any = image_transform(32, is_train=False, resize_mode=resize, interpolation=interpolation)
    expected = theirs(image)
    std, mean = torch.tensor(CLIP_STD).view(3, 1, 1), torch.tensor(CLIP_MEAN).view(3, 1, 1)
    levels = (expected * std + mean) * 255
    assert (ours.uint8(image).float() - levels).abs().max() < 1.01
    torch.testing.assert_close(ours([image])[0], expected, atol=1e-6, rtol=1e-6)


def test_preprocess_shapes_types_and_separate_resize() -> None:
    preprocess = Preprocess(size=24, resize_size=32)
    pixels = preprocess.uint8(picture(64, 48))
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 24, 24))
    whole = Preprocess(size=32).uint8(picture(64, 48))
    assert tuple(whole.shape) == (3, 32, 32)
    assert tuple(preprocess([]).shape) == (0, 3, 24, 24)
    batch = preprocess([picture(), picture(5, 90)])
    assert (batch.dtype, tuple(batch.shape)) == (torch.float32, (2, 3, 24, 24))


def test_a_strip_does_not_explode() -> None:
    strip = Image.new("RGB", (100_000, 1), (10, 20, 30))
    pixels = Preprocess(size=64).uint8(strip)
    assert tuple(pixels.shape) == (3, 64, 64)
    assert pixels[:, 32, 32].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("size", "jpeg_scale", "decoded"),
    [
        ((640, 480), "full", (640, 480)),
        ((640, 480), "2x", (640, 480)),
        ((640, 480), "1x", (320, 240)),
        ((1600, 1200), "2x", (800, 600)),
        ((1200, 1601), "1x", (300, 401)),
        ((223, 4000), "1x", (223, 4000)),
        ((4000, 4000), "1x", (500, 500)),
    ],
)
def test_jpegs_are_decoded_at_the_scale_that_the_model_wants(
    size: tuple[int, int], jpeg_scale: str, decoded: tuple[int, int], tmp_path: Path
) -> None:
    preprocess = Preprocess.model_validate({"jpeg_scale": jpeg_scale})
    image = Image.linear_gradient("L").resize(size)
    path = tmp_path / "picture.jpg"
    image.save(path)
    assert decode_image(path, min_side=preprocess.min_side).size == decoded
    assert decode_image(path, max_pixels=size[0] * size[1], min_side=preprocess.min_side).size == decoded
    with pytest.raises(ImageError, match="pixels are accepted"):
        decode_image(path, max_pixels=size[0] * size[1] - 1, min_side=preprocess.min_side)
    if size[0] == 640:
        assert decode_image(encoded(image, "PNG"), min_side=preprocess.min_side).size == size


def test_the_scale_counts_from_the_length_that_the_short_side_gets() -> None:
    assert Preprocess(size=224, resize_size=256, jpeg_scale="1x").min_side == 256
    assert Preprocess(size=224, resize="squash", jpeg_scale="2x").min_side == 448
    assert Preprocess().min_side is None


def test_pictures_that_somebody_opened_are_not_scaled() -> None:
    opened = Image.open(io.BytesIO(encoded(picture(640, 480), "JPEG")))
    assert decode_image(opened, min_side=16).size == opened.size == (640, 480)


def test_a_jpeg_scale_that_changes_nothing_is_not_written() -> None:
    """Fingerprints and folders from before there was one stay as they are."""
    assert "jpeg_scale" not in Preprocess().model_dump(mode="json")
    assert Preprocess(jpeg_scale="2x").model_dump(mode="json")["jpeg_scale"] == "2x"
    for preprocess in (Preprocess(size=32), Preprocess(jpeg_scale="1x")):
        assert Preprocess.model_validate(preprocess.model_dump(mode="json")) == preprocess
    model = ModelConfig(image={}, text={}, preprocess=Preprocess(size=32))
    assert "jpeg_scale" not in model.model_dump(mode="json")["preprocess"]


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"jpeg_scale": "4x"},
        {"std": (0, 1, 1)},
        {"resize": "longest"},
        {"resize": "squash", "resize_size": 300},
        {"x": 1},
    ],
)
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate(options)
