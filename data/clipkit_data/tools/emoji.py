"""The sample shards: every emoji of Google's Noto font with its names from Unicode CLDR.

`clipkit shards emoji OUT` renders them again. A picture is the font's own bitmap of one shaped glyph,
lossless and transparent; emoji that the font draws alike are one sample with several names. The split into
training and held-out samples is decided in `emoji_split` and depends on the names alone.

Needs three Debian packages: fonts-noto-color-emoji (OFL), unicode-cldr-core and unicode-data (Unicode
licence), and uharfbuzz (`pip install 'clipkit[emoji]'`).
"""

import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from clipkit.errors import DependencyError, NotFoundError
from clipkit.files import atomic_folder, atomic_write, sha256_file
from clipkit_data.shards.writing import write_shards
from clipkit_data.tools.emoji_split import RULE, parts_of, split_names

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
PACKAGES = {FONT: "fonts-noto-color-emoji", CLDR: "unicode-cldr-core", EMOJI_TEST: "unicode-data"}
ANNOTATIONS = ("annotations", "annotationsDerived")
SIDE = 136
PER_SHARD = 1000
_ROW = re.compile(r"(?P<codes>[0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[0-9.]+ (?P<name>.+)")


@dataclass
class Emoji:
    """One distinct picture."""

    text: str
    name: str
    group: str
    subgroup: str
    image: bytes
    keywords: list[str]
    name_zh: str | None
    keywords_zh: list[str]
    aliases: list[str] = field(default_factory=list)

    def record(self, split: str) -> dict[str, Any]:
        """The sample's `.json`."""
        base, _, modifiers = self.name.partition(": ")
        return {
            "name": self.name,
            "name_zh": self.name_zh,
            "keywords": self.keywords,
            "keywords_zh": self.keywords_zh,
            "aliases": self.aliases,
            "emoji": self.text,
            "codepoints": codes(self.text),
            "group": self.group,
            "subgroup": self.subgroup,
            "base": base,
            "modifiers": modifiers.split(", ") if modifiers else [],
            "parts": parts_of(self.name) or [],
            "split": split,
            "width": SIDE,
            "height": SIDE,
        }


def write_emoji_shards(out: Path, *, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Render all emoji and write `OUT/train`, `OUT/heldout` and `OUT/split.json`.

    Args:
        out: A new folder; it appears whole or not at all.
        progress: Called with 1 after each emoji.

    Returns:
        How many pictures, held-out pictures and merged names there are.

    Raises:
        NotFoundError: One of the Debian packages is missing.
        DependencyError: uharfbuzz is missing.
    """
    emoji = sorted(distinct_emoji(progress), key=lambda item: hashlib.sha256(item.text.encode()).digest())
    heldout = split_names([item.name for item in emoji])
    with atomic_folder(out) as folder:
        for split in ("train", "heldout"):
            chosen = [item for item in emoji if (item.name in heldout) == (split == "heldout")]
            samples = (
                {"image": item.image, "ext": "webp", "caption": item.name, "json": item.record(split)}
                for item in chosen
            )
            write_shards(samples, folder / split, per_shard=PER_SHARD)
        chosen = sorted((item.name, codes(item.text)) for item in emoji if item.name in heldout)
        document = {"rule": RULE, "inputs": input_digests(), "heldout": dict(chosen)}
        atomic_write(folder / "split.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    merged = sum(len(item.aliases) for item in emoji)
    return {"pictures": len(emoji), "heldout": len(chosen), "merged": merged, "out": str(out)}


def distinct_emoji(progress: Callable[[int], Any] | None = None) -> list[Emoji]:
    """Every fully qualified emoji that the font draws as one glyph; equal pictures are merged."""
    for path, package in PACKAGES.items():
        if not path.exists():
            raise NotFoundError(f"{path} is missing", hint=f"apt-get install {package}")
    draw = _renderer()
    names, keywords = annotations("en")
    names_zh, keywords_zh = annotations("zh")
    found: dict[str, Emoji] = {}
    for text, english, group, subgroup in emoji_rows():
        key = text.replace("\ufe0f", "")
        image = draw(text)
        if image is not None:
            name = names.get(key, english)
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            if digest in found:
                found[digest].aliases.append(name)
            else:
                found[digest] = Emoji(
                    text=text,
                    name=name,
                    group=group,
                    subgroup=subgroup,
                    image=webp(image),
                    keywords=keywords.get(key, []),
                    name_zh=names_zh.get(key),
                    keywords_zh=keywords_zh.get(key, []),
                )
        if progress:
            progress(1)
    return list(found.values())


def input_digests() -> dict[str, str]:
    """SHA-256 of each file that the shards are made from: other versions of them give other shards."""
    names = [CLDR / folder / f"{language}.xml" for folder in ANNOTATIONS for language in ("en", "zh")]
    return {"/".join(path.parts[-2:]): sha256_file(path) for path in (FONT, EMOJI_TEST, *names)}


def emoji_rows() -> Iterator[tuple[str, str, str, str]]:
    """Text, English name, group and subgroup of each fully qualified emoji, in Unicode's order.

    The name stands in where CLDR is older than the emoji.
    """
    group = subgroup = ""
    for line in EMOJI_TEST.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := _ROW.match(line):
            text = "".join(chr(int(code, 16)) for code in match["codes"].split())
            yield text, match["name"], group, subgroup


def annotations(language: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """CLDR's names and keywords by emoji (without variation selectors)."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for folder in ANNOTATIONS:
        for node in ET.parse(CLDR / folder / f"{language}.xml").iter("annotation"):
            text, words = node.attrib["cp"].replace("\ufe0f", ""), (node.text or "").strip()
            if node.get("type") == "tts":
                names[text] = words
            else:
                keywords[text] = [word.strip() for word in words.split("|") if word.strip()]
    return names, keywords


def codes(text: str) -> str:
    """The code points of an emoji as hexadecimal, for example `1F469 200D 1F692`."""
    return " ".join(f"{ord(character):X}" for character in text)


def webp(image: Image.Image) -> bytes:
    """The picture as lossless WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=100, method=4)
    return buffer.getvalue()


def _renderer() -> Callable[[str], Image.Image | None]:
    """A function from an emoji to its picture (RGBA, square), or None where it is not one bitmap glyph."""
    try:
        uharfbuzz = import_module("uharfbuzz")
    except ImportError as error:
        raise DependencyError("uharfbuzz is missing", hint="pip install 'clipkit[emoji]'") from error
    font = uharfbuzz.Font(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(FONT))))

    def draw(text: str) -> Image.Image | None:
        buffer = uharfbuzz.Buffer()
        buffer.add_str(text)
        buffer.guess_segment_properties()
        uharfbuzz.shape(font, buffer)
        glyphs = [glyph.codepoint for glyph in buffer.glyph_infos]
        png = font.get_glyph_color_png(glyphs[0]) if len(glyphs) == 1 else None
        if png is None or not len(png.data):
            return None
        drawn = Image.open(io.BytesIO(bytes(png.data))).convert("RGBA")
        square = Image.new("RGBA", (SIDE, SIDE))
        square.paste(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
        # Invisible pixels may hold any colour: make equal pictures equal.
        visible = square.getchannel("A").point(lambda alpha: 255 if alpha else 0)
        return Image.composite(square, Image.new("RGBA", (SIDE, SIDE)), visible)

    return draw
