"""Text on pictures: a font for every character that some font of this machine has.

Pillow draws with one font at a time and has no fallback. Here each character is drawn with the first of a few
common fonts that has it; where none has, the first font draws its box. Without any of these fonts Pillow's
own is used, which knows Latin letters.
"""

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipkit.errors import InputError
from clipkit.files import atomic_write

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Found by file name where the system keeps its fonts: Linux, macOS, Windows.
_NAMES = (
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSerifCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "arial.ttf",
    "msyh.ttc",
)
_NO_CHARACTER = "\U0010ffff"
_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}


@lru_cache(maxsize=32)
def _fonts(size: int) -> list[Font]:
    found: list[Font] = []
    for name in _NAMES:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return found or [ImageFont.load_default(size)]


def text_font(size: int) -> Font:
    """The first font there is, `size` pixels high."""
    return _fonts(size)[0]


@lru_cache(maxsize=65536)
def _font_of(character: str, size: int) -> Font:
    """The first font that draws something of its own for a character."""
    fonts = _fonts(size)
    for font in fonts:
        known = isinstance(font, ImageFont.FreeTypeFont)
        if known and _drawn(font, character) != _drawn(font, _NO_CHARACTER):
            return font
    return fonts[0]


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> bytes:
    """The pixels of a character: a font draws all characters that it lacks alike."""
    side = 2 * round(font.size)
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).text((0, 0), character, fill=255, font=font)
    return image.tobytes()


def _runs(text: str, size: int) -> Iterator[tuple[Font, str]]:
    """The text cut where the font changes; control characters and halves of surrogate pairs are boxes."""
    shown = "".join(character if character.isprintable() else "\ufffd" for character in text)
    for font, characters in groupby(shown, key=lambda character: _font_of(character, size)):
        yield font, "".join(characters)


def text_width(text: str, size: int) -> float:
    """How many pixels wide the text is."""
    return sum(font.getlength(run) for font, run in _runs(text, size))


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: str) -> None:
    """Draw one line of text, each character with a font that has it."""
    x, y = place
    for font, run in _runs(text, size):
        # Fonts differ in how high they are: their baselines, not their tops, belong on one line.
        anchor = "ls" if isinstance(font, ImageFont.FreeTypeFont) else None
        draw.text((x, y + size if anchor else y), run, fill=fill, font=font, anchor=anchor)
        x += font.getlength(run)


def wrap(text: str, size: int, width: float, lines: int) -> list[str]:
    """The text in at most `lines` lines of `width` pixels, cut between words where there are any."""
    found = [""]
    words = " ".join(text.split())
    for piece in _pieces(words):
        if found[-1] and text_width(found[-1] + piece.rstrip(), size) > width:
            found[-1] = found[-1].rstrip()
            found.append("")
        for character in piece:  # a word may be wider than a line
            if found[-1] and text_width(found[-1] + character.rstrip(), size) > width:
                found.append("")
            found[-1] += character
        if len(found) > lines:
            break
    if len(found) > lines:
        last = found[lines - 1]
        while last and text_width(last + "…", size) > width:
            last = last[:-1]
        found = [*found[: lines - 1], last + "…"]
    return found


def _pieces(text: str) -> Iterator[str]:
    """Words with the space after them; characters of scripts without spaces stand alone."""
    word = ""
    for character in text:
        if ord(character) >= 0x2E80:  # Chinese, Japanese, Korean and what follows
            yield from ((word,) if word else ())
            yield character
            word = ""
        else:
            word += character
            if character == " ":
                yield word
                word = ""
    if word:
        yield word


def picture_format(path: str | Path) -> str:
    """The format that the suffix stands for, as Pillow calls it. Raises: InputError for another suffix."""
    kind = _FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(f"{path}: cannot write such a picture", hint="name it .png, .webp or .jpg")
    return kind


def save_picture(image: Image.Image, path: str | Path) -> None:
    """Write a picture whole or not at all, in the format of the suffix.

    Raises:
        InputError: The suffix stands for no format, or the picture is too large for it.
    """
    kind, buffer = picture_format(path), BytesIO()
    try:
        image.save(buffer, kind)
    except (ValueError, OSError) as error:
        width, height = image.size
        raise InputError(
            f"{path}: {width} × {height} pixels cannot be written as {kind}: {error}",
            hint="show less, or name it .png",
        ) from error
    atomic_write(path, buffer.getvalue())
