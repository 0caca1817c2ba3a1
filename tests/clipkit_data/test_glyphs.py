"""The glyph sample shards: balanced, fairly split, hard enough, and exactly what the command writes."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.errors import NotFoundError
from clipkit.files import sha256_file
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards
from clipkit_data.tools import glyphs
from clipkit_data.tools.glyph_faces import FACES, Face

SHIPPED = Path(resolve_shards("sample:glyphs/train")[0]).parents[1]
DOCUMENT = json.loads((SHIPPED / "split.json").read_text())


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    found = {}
    for split in ("train", "heldout"):
        dataset = ShardDataset(resolve_shards(f"sample:glyphs/{split}"))
        assert dataset.faults == []
        found[split] = [dataset[position] for position in range(len(dataset))]
        dataset.close()
    return found


@pytest.fixture(scope="module")
def square_font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A font that has one character, A, and draws it as an upright rectangle."""
    pen = TTGlyphPen(None)
    for place, point in enumerate(((100, 0), (100, 900), (400, 900), (400, 0))):
        (pen.lineTo if place else pen.moveTo)(point)
    pen.closePath()
    box = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "A"])
    builder.setupCharacterMap({ord("A"): "A"})
    builder.setupGlyf({".notdef": box, "A": box})
    builder.setupHorizontalMetrics({".notdef": (500, 100), "A": (500, 100)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path = tmp_path_factory.mktemp("fonts") / "square.ttf"
    builder.save(str(path))
    return path


def pixels(record: Record) -> np.ndarray:
    """A picture's grey values, uint8 (SIDE, SIDE)."""
    return np.asarray(Image.open(io.BytesIO(record.image)).convert("L"))


def test_every_class_has_as_many_pictures_as_any_other(splits: dict[str, list[Record]]) -> None:
    for split, records in splits.items():
        counts = Counter(record.meta["label"] for record in records)
        wanted = {
            character: glyphs.PER_CLASS[split][glyphs.script_of(character)]
            for character in glyphs.LATIN + glyphs.HAN
        }
        assert counts == wanted


def test_pictures_are_dark_on_light_and_differ_within_a_class(splits: dict[str, list[Record]]) -> None:
    records = splits["train"] + splits["heldout"]
    assert len({(record.image, record.meta["label"]) for record in records}) == len(records)
    for record in records:
        grey = pixels(record)
        assert grey.shape == (glyphs.SIDE, glyphs.SIDE)
        border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        assert border.min() == 255
        assert grey.min() <= 153, "also the thinnest strokes show"
    assert {int(value) for value in np.unique(pixels(records[0]))} <= set(range(0, 256, 17))


def test_no_family_of_the_held_out_faces_is_in_training(splits: dict[str, list[Record]]) -> None:
    families = {split: {record.meta["family"] for record in records} for split, records in splits.items()}
    faces = {record.meta["face"] for record in splits["train"]}
    assert not families["train"] & families["heldout"]
    assert len(faces) >= 100
    assert len(families["heldout"]) >= 20
    for split, records in splits.items():
        assert families[split] <= set(DOCUMENT["families"][split])
        assert {record.meta["split"] for record in records} == {split}


def test_what_a_sample_says_of_itself(splits: dict[str, list[Record]]) -> None:
    by_face = {record.meta["face"]: record.meta for records in splits.values() for record in records}
    meta = by_face["Liberation Serif bold italic"]
    assert (meta["serif"], meta["bold"], meta["italic"], meta["mono"]) == (True, True, True, False)
    meta = by_face["DejaVu Sans Mono regular"]
    assert (meta["serif"], meta["bold"], meta["italic"], meta["mono"]) == (False, False, False, True)
    assert {meta["kind"] for meta in by_face.values()} == {"sans", "serif", "mono", "display", "hand"}
    captions = {r.meta["label"]: r.meta["caption"] for records in splits.values() for r in records}
    assert captions["A"] == "capital letter A"
    assert captions["g"] == "small letter g"
    assert captions["7"] == "digit seven"
    assert captions["水"] == "Chinese character 水"
    assert {r.meta["codepoint"] for r in splits["train"] if r.meta["label"] == "水"} == {"6C34"}


def test_letters_with_one_shape_for_both_cases_are_there_once() -> None:
    assert not set("ckopsuvwxyzl") & set(glyphs.LATIN)
    assert len(set(glyphs.LATIN + glyphs.HAN)) == len(glyphs.LATIN + glyphs.HAN) == 66


def test_the_shards_stay_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 5_000_000


def test_raw_pixels_know_some_held_out_faces_and_not_most(splits: dict[str, list[Record]]) -> None:
    ink = {split: np.stack([255.0 - pixels(r).ravel() for r in records]) for split, records in splits.items()}
    labels = {split: np.array([r.meta["label"] for r in records]) for split, records in splits.items()}
    unit = {split: rows / np.linalg.norm(rows, axis=1, keepdims=True) for split, rows in ink.items()}
    nearest = (unit["heldout"] @ unit["train"].T).argmax(axis=1)
    right = (labels["train"][nearest] == labels["heldout"]).mean()
    assert 0.4 < right < 0.6


def test_every_face_is_listed_with_its_package_and_licence() -> None:
    text = (SHIPPED / "LICENSES.txt").read_text(encoding="utf-8")
    for face in (face for faces in FACES.values() for face in faces):
        assert f"      {face.package} " in text
        assert face.family in text
        assert face.file in DOCUMENT["inputs"]


def test_a_font_has_the_characters_of_its_map_and_no_others(square_font: Path) -> None:
    face = Face("Square", "regular", "sans", False, square_font, 0, "fonts-square")
    assert glyphs.characters_of(face) == {ord("A")}


@settings(max_examples=50, deadline=None)
@given(style=st.text(max_size=20))
def test_ink_is_scaled_into_the_picture_whatever_the_face(square_font: Path, style: str) -> None:
    face = Face("Square", style, "sans", False, square_font, 0, "fonts-square")
    image = glyphs.draw(face, "A")
    assert image.tobytes() == glyphs.draw(face, "A").tobytes()
    rows, columns = np.nonzero(np.asarray(image) < 255)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert glyphs.SMALLEST <= height <= glyphs.LARGEST
    assert abs(width - height / 3) <= 1, "the rectangle keeps its shape"
    assert min(rows.min(), columns.min()) >= 1
    assert max(rows.max(), columns.max()) <= glyphs.SIDE - 2


def test_a_missing_font_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    face = Face("Nowhere", "regular", "sans", False, tmp_path / "nowhere.ttf", 0, "fonts-nowhere")
    monkeypatch.setattr(glyphs, "FACES", {"train": (face,), "heldout": ()})
    with pytest.raises(NotFoundError) as caught:
        glyphs.write_glyph_shards(tmp_path / "glyphs")
    assert caught.value.hint == "apt-get install fonts-nowhere"
    assert not (tmp_path / "glyphs").exists()


def test_the_command_writes_exactly_these_shards(tmp_path: Path) -> None:
    faces = [face for part in FACES.values() for face in part]
    missing = glyphs.missing_packages(faces)
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs Debian's packages {', '.join(missing)}")
    if glyphs.versions() != DOCUMENT["made_with"]:
        pytest.skip("this machine draws with other versions than the shards were made with")
    if any(sha256_file(face.path) != DOCUMENT["inputs"][face.file] for face in faces):
        pytest.skip("this machine's fonts are other versions than the shards were made from")
    result = glyphs.write_glyph_shards(tmp_path / "glyphs")
    assert result["pictures"] == 2374
    for path in sorted((tmp_path / "glyphs").rglob("*")):
        if path.is_file() and path.suffix != ".parquet":
            twin = SHIPPED / path.relative_to(tmp_path / "glyphs")
            assert path.read_bytes() == twin.read_bytes(), twin.name
