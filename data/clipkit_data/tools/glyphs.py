"""The glyph sample shards: letters, digits and a few Chinese characters in many open fonts.

`clipkit shards glyphs OUT` renders them again. A sample's label is its character; a class is one character in
as many faces as there is room for, chosen by a hash of face and character. The held-out families are drawn in
no training picture (`glyph_faces`), so a method is judged on designs that it has never seen.

A character is drawn large, cut to its ink, scaled so that its longest side is between SMALLEST and LARGEST
pixels, and put somewhere into the picture; how large and where is a hash of face and character too. Raw
pixels therefore recognise half of the held-out pictures and no more. As size says nothing, of letters whose
two cases have one shape (C, K, O, P, S, U, V, W, X, Y, Z) only the capitals are here; the small l, which is a
capital I or a 1 in many fonts, is not.

Needs the Debian packages that `glyph_faces` names and uharfbuzz (`pip install 'clipkit[emoji]'`).
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

from clipkit.errors import DependencyError, NotFoundError
from clipkit.files import atomic_folder, atomic_write, sha256_file
from clipkit_data.tools.emoji import webp
from clipkit_data.tools.glyph_faces import FACES, Face
from clipkit_data.tools.labelled import Labelled, write_labelled

LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abdefghijmnqrt" + "0123456789"
HAN = "人大山水火木日月中天女心手田雨馬"
PER_CLASS = {"train": {"latin": 35, "digit": 35, "han": 10}, "heldout": {"latin": 8, "digit": 8, "han": 4}}
SIDE = 32
SMALLEST, LARGEST = 22, 28  # the longest side of the ink, in pixels
PER_SHARD = 1000
GREYS = 16
_LARGE = 192
RULE = (
    "Families are split by hand; none is in both parts. A class takes, of the faces of a part that have the "
    "character, those whose SHA-256 of 'FACE/CHARACTER' comes first, and passes over a picture that another "
    "face gave already."
)


def write_glyph_shards(out: Path, *, progress: Callable[[int], Any] | None = None) -> dict[str, Any]:
    """Render all classes and write `OUT/train`, `OUT/heldout` and `OUT/split.json`.

    Args:
        out: A new folder; it appears whole or not at all.
        progress: Called with 1 after each picture.

    Returns:
        How many pictures, held-out pictures, classes and faces there are.

    Raises:
        NotFoundError: A font is missing; the hint names the Debian packages.
        DependencyError: uharfbuzz is missing.
    """
    faces = [face for part in FACES.values() for face in part]
    missing = missing_packages(faces)
    if missing:
        raise NotFoundError(
            f"{len(missing)} font packages are missing", hint=f"apt-get install {' '.join(missing)}"
        )
    glyphs = list(distinct_glyphs(progress))
    with atomic_folder(out) as folder:
        for split in FACES:
            chosen = sorted((glyph for glyph in glyphs if glyph.split == split), key=Glyph.order)
            write_labelled((glyph.labelled() for glyph in chosen), folder / split, per_shard=PER_SHARD)
        document = {
            "rule": RULE,
            "made_with": versions(),
            "inputs": {face.file: sha256_file(face.path) for face in faces},
            "families": {split: list(dict.fromkeys(face.family for face in FACES[split])) for split in FACES},
        }
        atomic_write(folder / "split.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    heldout = sum(glyph.split == "heldout" for glyph in glyphs)
    return {
        "pictures": len(glyphs),
        "heldout": heldout,
        "classes": len({glyph.character for glyph in glyphs}),
        "faces": len({glyph.face for glyph in glyphs}),
        "out": str(out),
    }


@dataclass(frozen=True, slots=True)
class Glyph:
    """One picture and what it is of."""

    character: str
    face: Face
    split: str
    image: bytes

    def order(self) -> bytes:
        """What the samples of a split are sorted by: classes and faces come mixed."""
        return _digest(self.face, self.character)

    def labelled(self) -> Labelled:
        """The sample; it has no `.txt`, whose header alone would be a third of it."""
        face = self.face
        more = {
            "caption": describe(self.character),
            "script": script_of(self.character),
            "codepoint": f"{ord(self.character):04X}",
            "face": face.name,
            "family": face.family,
            "style": face.style,
            "kind": face.kind,
            "serif": face.serif,
            "bold": face.bold,
            "italic": face.italic,
            "mono": face.kind == "mono",
            "split": self.split,
        }
        return Labelled(self.image, "webp", self.character, None, more)


def distinct_glyphs(progress: Callable[[int], Any] | None = None) -> Iterator[Glyph]:
    """The glyphs of all classes as `RULE` says, training before held-out."""
    for character in LATIN + HAN:
        seen: set[bytes] = set()
        for split, faces in FACES.items():
            left = PER_CLASS[split][script_of(character)]
            for face in sorted(faces, key=lambda face: _digest(face, character)):
                if left and ord(character) in characters_of(face):
                    image = draw(face, character)
                    if image.tobytes() not in seen:
                        seen.add(image.tobytes())
                        left -= 1
                        yield Glyph(character, face, split, webp(image))
                        if progress:
                            progress(1)


def missing_packages(faces: Iterable[Face]) -> list[str]:
    """The Debian packages whose fonts are not on this machine."""
    return sorted({face.package for face in faces if not face.path.exists()})


def versions() -> dict[str, str | None]:
    """What draws and encodes: other versions may give other bytes."""
    names = {"pillow": "pil", "freetype": "freetype2", "webp": "webp"}
    return {name: features.version(feature) for name, feature in names.items()}


def script_of(character: str) -> str:
    """latin, digit or han."""
    return "digit" if character.isdigit() else "latin" if character.isascii() else "han"


def describe(character: str) -> str:
    """A character in words: "capital letter A", "small letter g", "digit seven"."""
    match script_of(character):
        case "han":
            return f"Chinese character {character}"
        case "digit":
            return unicodedata.name(character).lower()
        case _:
            return f"{'capital' if character.isupper() else 'small'} letter {character}"


def draw(face: Face, character: str) -> Image.Image:
    """A character in a face: dark on light, (SIDE, SIDE), with GREYS shades of grey."""
    font = _font(face)
    left, top, right, bottom = font.getbbox(character)
    large = Image.new("L", (math.ceil(right - left) + 8, math.ceil(bottom - top) + 8))
    ImageDraw.Draw(large).text((4 - left, 4 - top), character, fill=255, font=font)
    ink = large.crop(large.getbbox())
    digest = _digest(face, character)
    longest = SMALLEST + digest[-1] % (LARGEST - SMALLEST + 1)
    width, height = (max(1, round(side * longest / max(ink.size))) for side in ink.size)
    place = 1 + digest[-2] % (SIDE - 1 - width), 1 + digest[-3] % (SIDE - 1 - height)
    image = Image.new("L", (SIDE, SIDE))
    image.paste(ink.resize((width, height), Image.Resampling.BOX), place)
    step = 255 // (GREYS - 1)
    return image.point([255 - (value + step // 2) // step * step for value in range(256)])


@lru_cache(maxsize=512)
def characters_of(face: Face) -> frozenset[int]:
    """The code points that a face has glyphs for, by its character map. Raises: DependencyError."""
    try:
        uharfbuzz = import_module("uharfbuzz")
    except ImportError as error:
        raise DependencyError("uharfbuzz is missing", hint="pip install 'clipkit[emoji]'") from error
    return frozenset(uharfbuzz.Face(uharfbuzz.Blob.from_file_path(str(face.path)), face.index).unicodes)


@lru_cache(maxsize=512)
def _font(face: Face) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(face.path), _LARGE, index=face.index, layout_engine=ImageFont.Layout.BASIC)


def _digest(face: Face, character: str) -> bytes:
    """SHA-256 of a face and a character: what decides order, size and place."""
    return hashlib.sha256(f"{face.name}/{character}".encode()).digest()
