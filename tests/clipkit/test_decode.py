"""Fast pictures: the pixels, the refusals and the limits of the plain path, for every kind of file."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from clipkit import decode
from clipkit.decode import decoder, read_picture
from clipkit.errors import ImageError, InputError
from clipkit.images import Preprocess, decode_image

MODEL = Preprocess(size=48)
ORIENTATION = 0x0112


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture like a photograph: slow gradients, hard edges, a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    red, green = 200 * x / width + 30, 200 * y / height
    pixels = np.stack([red, green, 230 - (red + green) / 2], axis=-1)
    pixels[(x - width / 3) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 4) ** 2] = (250, 240, 20)
    pixels[:, width * 3 // 4 : width * 3 // 4 + 2] = 0
    noise = rng.normal(0, 6, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, exif=exif)


def reference(data: bytes, preprocess: Preprocess = MODEL) -> Tensor:
    return preprocess.uint8(decode_image(data, min_side=preprocess.min_side))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (torch.uint8, theirs.shape)
    assert ours.is_contiguous()
    assert torch.equal(ours, theirs)


JPEGS: dict[str, dict[str, Any]] = {
    "4:2:0": {},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True},
    "coarse": {"quality": 5},
    "other tables": {"optimize": True, "quality": 100},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_have_the_pixels_of_the_plain_path(options: dict[str, Any], mode: str) -> None:
    for size in ((160, 120), (121, 333), (40, 31)):
        data = encoded(photo(*size).convert(mode), **options)
        assert_same(read_picture(data, MODEL), reference(data))


def test_four_colour_jpegs_go_to_pillow() -> None:
    data = encoded(photo(90, 70).convert("CMYK"), quality=90)
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0  # no transform: CMYK
    for transform in (0, 2):  # 2: YCCK
        changed = data[: adobe + 11] + bytes([transform]) + data[adobe + 12 :]
        assert_same(read_picture(changed, MODEL), reference(changed))


def test_the_first_picture_of_a_stereo_jpeg_is_taken() -> None:
    data = encoded(photo(90, 70), "MPO", save_all=True, append_images=[Image.new("RGB", (90, 70))])
    ours = read_picture(data, MODEL)
    assert_same(ours, reference(data))
    assert ours.float().std() > 20


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    data = turned(photo(150, 90), orientation)
    ours = read_picture(data, MODEL)
    assert_same(ours, reference(data))
    if orientation in range(2, 9):
        assert not torch.equal(ours, read_picture(encoded(photo(150, 90)), MODEL))


def test_broken_exif_is_no_reason_to_refuse_a_picture() -> None:
    data = encoded(photo(90, 70), exif=b"Exif\0\0garbage")
    assert_same(read_picture(data, MODEL), reference(data))


def lossless() -> dict[str, bytes]:
    image = photo(90, 70)
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [Image.new("RGB", image.size)]}
    return {
        "PNG": encoded(image, "PNG"),
        "PNG L": encoded(image.convert("L"), "PNG"),
        "PNG LA": encoded(clear.convert("LA"), "PNG"),
        "PNG RGBA": encoded(clear, "PNG"),
        "PNG 1": encoded(image.convert("1"), "PNG"),
        "PNG P": encoded(image.convert("P"), "PNG"),
        "PNG P with a clear colour": encoded(image.convert("P"), "PNG", transparency=3),
        "PNG of 16 bits": encoded(deep, "PNG"),
        "WebP": encoded(image, "WEBP"),
        "WebP with alpha": encoded(clear, "WEBP", lossless=True),
        "WebP of two frames": encoded(image, "WEBP", **frames),
        "BMP": encoded(image, "BMP"),
        "GIF": encoded(image, "GIF"),
        "GIF of two frames": encoded(image, "GIF", **frames),
    }


@pytest.mark.parametrize("kind", lossless())
def test_other_formats_have_the_pixels_of_the_plain_path(kind: str) -> None:
    data = lossless()[kind]
    assert_same(read_picture(data, MODEL), reference(data))


@settings(max_examples=120, deadline=None)
@given(
    width=st.integers(1, 260),
    height=st.integers(1, 260),
    size=st.integers(1, 64),
    more=st.integers(0, 20),
    resize=st.sampled_from(["shortest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    kind=st.sampled_from(["JPEG", "PNG"]),
    seed=st.integers(0, 1000),
)
def test_any_size_and_rule_gives_the_pixels_of_the_plain_path(
    width: int, height: int, size: int, more: int, resize: str, interpolation: str, kind: str, seed: int
) -> None:
    resize_size = size + more if resize == "shortest" and more else None
    preprocess = Preprocess.model_validate(
        {"size": size, "resize": resize, "interpolation": interpolation, "resize_size": resize_size}
    )
    data = encoded(photo(width, height, seed), kind)
    assert_same(read_picture(data, preprocess), reference(data, preprocess))


@pytest.mark.parametrize("size", [(75, 250), (60, 90), (30, 400), (250, 75)])
def test_hard_edges_show_that_the_passes_run_in_pillows_order(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(3).integers(0, 2, (size[1], size[0], 3)) * 255
    data = encoded(Image.fromarray(noise.astype(np.uint8)), "PNG")
    for preprocess in (Preprocess(size=64, resize="squash"), MODEL):
        assert_same(read_picture(data, preprocess), reference(data, preprocess))


def test_a_very_long_picture_is_cut_before_it_is_scaled() -> None:
    data = encoded(photo(6000, 3), "PNG")
    assert_same(read_picture(data, MODEL), reference(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_more_than_a_megapixel_is_a_level_off_here_and_there(kind: str) -> None:
    for size in ((1200, 900), (700, 1600)):
        data = encoded(photo(*size), kind)
        difference = (read_picture(data, MODEL).int() - reference(data).int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.02


# --- crops ---


@pytest.mark.parametrize(
    ("crop", "box"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 150, 90)),
        ((0.1, 0.2, 0.5, 0.5), (15, 18, 90, 63)),
        ((0.5, 0.0, 0.5, 1.0), (75, 0, 150, 90)),
        ((1 / 3, 1 / 3, 1 / 3, 2 / 3), (50, 30, 100, 90)),
        ((0.999, 0.999, 0.001, 0.001), (149, 89, 150, 90)),
        ((1.0, 0.0, 1e-9, 1.0), (149, 0, 150, 90)),
    ],
)
def test_a_crop_is_cut_out_and_squashed(crop: tuple, box: tuple) -> None:
    for data in (encoded(photo(150, 90)), encoded(photo(150, 90), "PNG")):
        expected = decode_image(data).crop(box).resize((48, 48), Image.Resampling.BICUBIC)
        ours = read_picture(data, MODEL, crop=crop)
        assert_same(ours, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_a_crop_is_of_the_upright_picture() -> None:
    data = turned(photo(150, 90), 6)
    expected = decode_image(data).crop((9, 75, 45, 150)).resize((48, 48), Image.Resampling.BICUBIC)
    ours = read_picture(data, MODEL, crop=(0.1, 0.5, 0.4, 0.5))
    assert_same(ours, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


@pytest.mark.parametrize(
    "crop",
    [
        (-0.1, 0, 0.5, 0.5),
        (0, 0.6, 0.5, 0.5),
        (0, 0, 1.1, 1),
        (0, 0, 0, 1),
        (0, 0, 1, -0.5),
        (0, 0, float("nan"), 1),
        (float("nan"), 0, 1, 1),
    ],
)
def test_a_crop_that_is_no_box_is_refused(crop: tuple) -> None:
    with pytest.raises(InputError, match=r"sample 7: the crop .* is no box"):
        read_picture(encoded(photo(20, 20)), MODEL, name="sample 7", crop=crop)


# --- DCT scaling ---


@pytest.mark.parametrize("jpeg_scale", ["full", "2x", "1x"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_scaled_decoding_has_the_pixels_of_the_plain_path(jpeg_scale: str, orientation: int) -> None:
    preprocess = Preprocess.model_validate({"size": 48, "jpeg_scale": jpeg_scale})
    for size in ((640, 480), (333, 1001), (60, 60)):
        data = turned(photo(*size), orientation)
        assert_same(read_picture(data, preprocess), reference(data, preprocess))


def test_scaled_decoding_gives_slightly_other_pixels() -> None:
    data = encoded(photo(640, 480), quality=90)
    full = reference(data).float()
    for jpeg_scale, most in (("2x", 1.0), ("1x", 3.0)):
        scaled = read_picture(data, Preprocess.model_validate({"size": 48, "jpeg_scale": jpeg_scale}))
        assert 0 < (scaled.float() - full).abs().mean() < most


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_of_a_scaled_picture_keeps_its_resolution(orientation: int) -> None:
    """Upright 400 × 800, of which 100 × 480 is cut out: at 1/2, its short side is still 48."""
    size = (400, 800) if orientation == 1 else (800, 400)
    data = turned(photo(*size), orientation)
    preprocess, crop = Preprocess(size=48, jpeg_scale="1x"), (0.5, 0.2, 0.25, 0.6)
    half = decode_image(data, min_side=200)
    assert half.size == (200, 400)
    expected = half.crop((100, 80, 150, 320)).resize((48, 48), Image.Resampling.BICUBIC)
    ours = read_picture(data, preprocess, crop=crop)
    assert_same(ours, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


# --- what is refused ---


def outcome(read: Any, data: bytes) -> str:
    try:
        read(data)
    except ImageError as error:
        return error.reason
    return "decoded"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_cut_jpeg_is_refused_wherever_it_is_cut(options: dict[str, Any]) -> None:
    data = encoded(photo(48, 40), **options)
    for end in range(0, len(data) - 1, 5):
        for part in (data[:end], data[:end] + b"\xff\xd9"):
            ours = outcome(lambda part: read_picture(part, MODEL), part)
            assert ours == outcome(reference, part), end
            assert part is not data[:end] or ours != "decoded"
    with pytest.raises(ImageError, match="sample 7 cannot be decoded") as caught:
        read_picture(data[: len(data) // 2], MODEL, name="sample 7")
    assert caught.value.reason == "undecodable"


def test_damage_is_refused_where_the_plain_path_refuses_it() -> None:
    rng, data = np.random.default_rng(0), encoded(photo(48, 40))
    seen = set()
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            damaged[position] = rng.integers(0, 256)
        ours = outcome(lambda part: read_picture(part, MODEL), bytes(damaged))
        assert ours == outcome(reference, bytes(damaged))
        seen.add(ours)
    assert {"decoded", "undecodable"} <= seen


def test_the_limits_hold_before_anything_is_decoded() -> None:
    data = encoded(photo(20, 12))
    cases: list[tuple[bytes, dict[str, Any], str]] = [
        (b"", {}, "empty"),
        (b"<html><body>404", {}, "format"),
        (encoded(photo(20, 12), "TIFF"), {}, "format"),
        (data, {"max_pixels": 239}, "too_large"),
        (data, {"max_bytes": len(data) - 1}, "too_large"),
    ]
    for wrong, limits, reason in cases:
        with pytest.raises(ImageError) as caught:
            read_picture(wrong, MODEL, **limits)
        assert caught.value.reason == reason
    assert read_picture(data, MODEL, max_pixels=240, max_bytes=len(data)).shape == (3, 48, 48)


def test_a_jpeg_that_promises_too_many_pixels_is_refused() -> None:
    data = encoded(photo(20, 12))
    frame = data.index(b"\xff\xc0\x00\x11\x08") + 5
    bomb = data[:frame] + b"\xff\x00\xff\x00" + data[frame + 4 :]
    with pytest.raises(ImageError, match="pixels") as caught:
        read_picture(bomb, MODEL)
    assert caught.value.reason == "too_large"


# --- the decoder ---


def forget_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "simplejpeg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(decode, "_simplejpeg", cache(decode._simplejpeg.__wrapped__))


def test_pillow_decodes_where_simplejpeg_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = encoded(photo(160, 120))
    fast = read_picture(data, MODEL)
    assert decoder().startswith("simplejpeg ")
    forget_simplejpeg(monkeypatch)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert_same(read_picture(data, MODEL), fast)
    assert_same(read_picture(data, MODEL), fast)
    assert [record.message for record in caplog.records] == [
        "simplejpeg is not installed; Pillow decodes JPEGs instead, more slowly"
    ]
    assert decoder().startswith("pillow ")


def test_pillow_decodes_where_simplejpeg_does_not_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "simplejpeg").mkdir()
    (tmp_path / "simplejpeg/__init__.py").write_text('raise ImportError("built for another NumPy")\n')
    forget_simplejpeg(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    data = encoded(photo(160, 120))
    assert_same(read_picture(data, MODEL), reference(data))
    assert "simplejpeg is unusable: built for another NumPy" in caplog.text


def test_the_decoder_is_loaded_with_the_first_jpeg_and_torchvision_never() -> None:
    code = """
import sys
from clipkit.decode import read_picture
from clipkit.images import Preprocess
assert "simplejpeg" not in sys.modules
assert read_picture(sys.stdin.buffer.read(), Preprocess(size=16)).shape == (3, 16, 16)
assert "simplejpeg" in sys.modules
assert "torchvision" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], input=encoded(photo(40, 30)), check=True, timeout=120)


def test_threads_read_the_same_pixels() -> None:
    files = [encoded(photo(200, 150, seed)) for seed in range(8)] * 8
    alone = [read_picture(data, MODEL) for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda data: read_picture(data, MODEL), files))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_a_damaged_picture_of_any_format_is_refused_and_not_half_read() -> None:
    """Pillow decodes a PNG to look for its EXIF; an error there must not be lost."""
    axis = np.arange(40, dtype=np.uint8)
    pixels = np.stack([np.add.outer(axis, k * axis) for k in (1, 2, 3)], axis=-1)
    for kind, mark in (("PNG", b"IDAT"), ("BMP", b"BM")):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        if kind == "BMP":
            del data[-50:]
        else:
            start = data.index(mark) + 8
            data[start : start + 8] = bytes(8)
        for crop in (None, (0.0, 0.0, 0.5, 0.5), lambda width, height: (0.0, 0.0, 1.0, 1.0)):
            with pytest.raises(ImageError, match="cannot be decoded") as found:
                read_picture(bytes(data), Preprocess(size=16), crop=crop)
            assert found.value.reason == "undecodable"


def test_a_crop_may_depend_on_the_upright_size() -> None:
    image = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint32).reshape(60, 40, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=exif)
        seen: list[tuple[int, int]] = []

        def box(width: int, height: int, seen: list[tuple[int, int]] = seen) -> tuple[float, ...]:
            seen.append((width, height))
            return (0.5, 0.0, 0.5, 0.5)

        found = read_picture(buffer.getvalue(), Preprocess(size=8), crop=box)  # pyright: ignore[reportArgumentType]
        assert seen == [(60, 40)]
        assert torch.equal(
            found, read_picture(buffer.getvalue(), Preprocess(size=8), crop=(0.5, 0.0, 0.5, 0.5))
        )
