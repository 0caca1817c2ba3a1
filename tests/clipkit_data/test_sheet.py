"""Contact sheets: the right pictures in their places, captions in any script, faults with their reason."""

import base64
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from clipkit.errors import ConfigError, InputError, NotFoundError
from clipkit_data.dataset import ShardDataset
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.fonts import draw_text, save_picture, text_width, wrap
from clipkit_data.tools.sheet import choose, write_sheet

COLOURS = ("#ff0000", "#00ff00", "#0000ff", "#ffff00", "#00ffff")


@pytest.fixture
def colours(write_shard: Callable[..., Path]) -> ShardDataset:
    """Five plain pictures and one that cannot be decoded."""
    samples = []
    for number, colour in enumerate(COLOURS):
        buffer = BytesIO()
        Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
        samples.append({"__key__": f"k{number}", "png": buffer.getvalue(), "txt": f"<b>{number}".encode()})
    samples.append({"__key__": "bad", "png": b"no picture", "txt": "猫 ماء 🦄 \x00\u202e".encode()})
    return ShardDataset([write_shard("00000.tar", samples)], name="colours")


def test_the_pictures_stand_in_order(colours: ShardDataset, tmp_path: Path) -> None:
    write_sheet(colours, [4, 0, 1, 5], tmp_path / "sheet.png", side=64, columns=2)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert pixels.shape[1] == 8 + 2 * 72
    height = (pixels.shape[0] - 8) // 2
    found = [
        tuple(pixels[8 + 32 + row * height, 8 + 32 + column * 72]) for row in (0, 1) for column in (0, 1)
    ]
    assert found[:3] == [(0, 255, 255), (255, 0, 0), (0, 255, 0)]
    assert (pixels[8 + height :, 8 + 72 :] == (0xCC, 0, 0)).all(axis=-1).sum() > 4 * 63, (
        "the fault has a frame"
    )
    under = pixels[8 + 66 : 8 + height - 2, 8:72]
    assert (under < 128).any(), "the caption is written under its picture"


def test_a_page_needs_no_other_file(colours: ShardDataset, tmp_path: Path) -> None:
    write_sheet(colours, [0, 5], tmp_path / "sheet.html")
    text = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;0" in text
    assert "<b>0" not in text
    assert "picture format" in text
    assert "猫 ماء 🦄" in text
    (data,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    with Image.open(BytesIO(base64.b64decode(data))) as image:
        assert image.size == (64, 64)
    assert "http" not in text


def test_samples_are_chosen(colours: ShardDataset) -> None:
    assert choose(colours, 3) == [0, 1, 2]
    assert choose(colours, 100) == list(range(6))
    drawn = choose(colours, 4, random=True, seed=1)
    assert drawn == choose(colours, 4, random=True, seed=1)
    assert len(set(drawn)) == 4
    assert {tuple(choose(colours, 4, random=True, seed=seed)) for seed in range(5)} != {tuple(drawn)}
    assert choose(colours, 1, keys=["k3", "bad"]) == [3, 5]
    with pytest.raises(NotFoundError, match="'k9'"):
        choose(colours, 1, keys=["k3", "k9"])
    with pytest.raises(ConfigError, match="samples to show"):
        choose(colours, 0)


def test_a_key_that_comes_twice_is_shown_twice(write_shard: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("twice/00000.tar", "twice/00001.tar"):
        write_shard(name, 2)
    dataset = ShardDataset(resolve_shards(tmp_path / "twice"))
    assert choose(dataset, 1, keys=["000000001"]) == [1, 3]


def test_what_cannot_be_written(colours: ShardDataset, tmp_path: Path) -> None:
    for suffix in (".pdfx", ".pdf", ".tiff", ".gif"):
        with pytest.raises(InputError, match=r"name it \.png"):
            write_sheet(colours, [0], tmp_path / f"sheet{suffix}")
    with pytest.raises(InputError, match=r"17000 pixels cannot be written as WEBP.*name it \.png"):
        save_picture(Image.new("RGB", (4, 17_000)), tmp_path / "sheet.webp")
    with pytest.raises(ConfigError, match="longest side"):
        write_sheet(colours, [0], tmp_path / "sheet.png", side=3)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


@given(text=st.text(max_size=80), width=st.integers(40, 200), lines=st.integers(1, 4))
def test_any_text_is_wrapped_and_drawn(text: str, width: int, lines: int) -> None:
    wrapped = wrap(text, 13, width, lines)
    assert 1 <= len(wrapped) <= lines
    assert all(text_width(line, 13) <= width + 1 or len(line) <= 2 for line in wrapped)
    if not wrapped[-1].endswith("…"):
        assert "".join(wrapped).replace(" ", "") == "".join(text.split())
    draw = ImageDraw.Draw(Image.new("RGB", (220, 30), "white"))
    draw_text(draw, (0, 0), wrapped[0], 13, "black")
