"""A contact sheet: pictures of shards side by side with their captions, as one picture or one web page.

What cannot be decoded has its place too, with the reason written on it: a sheet is for seeing what is there.
"""

import base64
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw

from clipkit.errors import ConfigError, ImageError, NotFoundError
from clipkit.files import atomic_write
from clipkit.images import decode_image
from clipkit_data.dataset import ShardDataset
from clipkit_data.keyed import epoch_order
from clipkit_data.records import RecordError
from clipkit_data.shards.scan import picture_reason
from clipkit_data.tools.fonts import draw_text, save_picture, wrap

_GAP, _TEXT, _LINES = 8, 13, 3
_LINE = round(_TEXT * 1.4)
_STYLE = (
    "body{font:14px sans-serif;margin:16px}main{display:grid;gap:16px;"
    "grid-template-columns:repeat(auto-fill,minmax(%dpx,1fr))}figure{margin:0}"
    "img,div{max-width:100%%;background:#eee;min-height:2em}small{color:#666}"
)


@dataclass(frozen=True)
class Shown:
    """One sample on the sheet; `picture` is None where it cannot be decoded, and `fault` says why."""

    key: str
    caption: str
    picture: Image.Image | None
    fault: str = ""


def choose(
    dataset: ShardDataset, count: int, *, random: bool = False, seed: int = 0, keys: Sequence[str] = ()
) -> list[int]:
    """The positions of the samples to show.

    Args:
        dataset: The shards.
        count: How many, at most; with `keys` it is not used.
        random: Draw them by `seed` instead of taking the first.
        seed: At least 0.
        keys: Show the samples with these keys, in this order; where a key comes twice, all that have it.

    Raises:
        ConfigError: `count` is below 1 or `seed` below 0.
        NotFoundError: No sample has a key.
    """
    if count < 1 or seed < 0:
        raise ConfigError(
            f"samples to show must be at least 1 and the seed at least 0, got {count} and {seed}"
        )
    if not keys:
        order = epoch_order(seed, 0, len(dataset)) if random else range(len(dataset))
        return [int(position) for position in order[:count]]
    found: dict[str, list[int]] = {key: [] for key in keys}
    for position in range(len(dataset)):
        found.get(dataset.key(position), []).append(position)
    for key, positions in found.items():
        if not positions:
            hint = f"for example {dataset.key(0)!r}"
            raise NotFoundError(f"no sample of {dataset.name} has the key {key!r}", hint=hint)
    return [position for positions in found.values() for position in positions]


def write_sheet(
    dataset: ShardDataset, positions: Sequence[int], out: str | Path, *, side: int = 160, columns: int = 8
) -> None:
    """Write the sheet of some samples.

    Args:
        dataset: The shards.
        positions: Which samples, in order.
        out: `.html` makes one page that needs no other file; `.png`, `.webp` or `.jpg` a picture.
        side: Longest side of a picture on the sheet, pixels.
        columns: Pictures in a row; a page fits them to the window.

    Raises:
        ConfigError: `side` or `columns` is too small.
        InputError: Another suffix.
    """
    if side < 32 or columns < 1:
        raise ConfigError(
            f"the longest side must be at least 32 pixels and columns at least 1, got {side} and {columns}"
        )
    shown = (_shown(dataset, position, side) for position in positions)
    if Path(out).suffix.lower() in (".html", ".htm"):
        atomic_write(out, _page(dataset.name, shown, side))
    else:
        save_picture(_picture(list(shown), side, min(columns, len(positions))), out)


def _shown(dataset: ShardDataset, position: int, side: int) -> Shown:
    key = dataset.key(position)
    caption = ""
    try:
        record = dataset[position]
        caption = record.caption or ""
        picture = decode_image(record.image, name=key)
    except ImageError as error:
        return Shown(key, caption, None, picture_reason(error))
    except RecordError as error:
        return Shown(key, caption, None, error.reason)
    picture.thumbnail((side, side))
    return Shown(key, caption, picture)


def _picture(shown: Sequence[Shown], side: int, columns: int) -> Image.Image:
    wide, high = side + _GAP, side + _GAP + _LINES * _LINE
    sheet = Image.new("RGB", (_GAP + columns * wide, _GAP + math.ceil(len(shown) / columns) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for number, sample in enumerate(shown):
        x, y = _GAP + number % columns * wide, _GAP + number // columns * high
        if sample.picture is None:
            draw.rectangle((x, y, x + side - 1, y + side - 1), fill="#f4f4f4", outline="#cc0000")
            for line, text in enumerate(wrap(sample.fault, _TEXT, side - _GAP, _LINES)):
                draw_text(draw, (x + _GAP / 2, y + _GAP + line * _LINE), text, _TEXT, "#cc0000")
        else:
            width, height = sample.picture.size
            sheet.paste(sample.picture, (x + (side - width) // 2, y + (side - height) // 2))
        for line, text in enumerate(wrap(sample.caption or sample.key, _TEXT, side, _LINES)):
            draw_text(draw, (x, y + side + 2 + line * _LINE), text, _TEXT, "#222222")
    return sheet


def _page(title: str, shown: Iterator[Shown], side: int) -> str:
    """One HTML page with the pictures inside."""
    lines = ["<!doctype html>", '<meta charset="utf-8">', f"<title>{html.escape(title)}</title>"]
    lines += [f"<style>{_STYLE % side}</style>", "<main>"]
    for sample in shown:
        text = html.escape(sample.caption.encode("utf-8", "replace").decode())
        if sample.picture is None:
            inside = f"<div>{html.escape(sample.fault)}</div>"
        else:
            buffer = BytesIO()
            sample.picture.save(buffer, "WEBP", quality=85)
            data = base64.b64encode(buffer.getvalue()).decode()
            inside = f'<img alt="" src="data:image/webp;base64,{data}">'
        name = html.escape(sample.key)
        lines.append(f"<figure>{inside}<figcaption>{text}<br><small>{name}</small></figcaption></figure>")
    return "\n".join([*lines, "</main>", ""])
