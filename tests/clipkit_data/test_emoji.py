"""The sample shards: complete, distinct, fairly split, and exactly what the command writes."""

import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import tar_file_expander

from clipkit_data.dataset import ShardDataset
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards
from clipkit_data.tools import emoji
from clipkit_data.tools.emoji_split import HELDOUT, LEAST, parts_of, split_names


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    found = {}
    for split in ("train", "heldout"):
        dataset = ShardDataset(resolve_shards(f"sample:emoji/{split}"))
        assert dataset.faults == []
        found[split] = [dataset[position] for position in range(len(dataset))]
        dataset.close()
    return found


def test_pictures_are_distinct_and_drawn(splits: dict[str, list[Record]]) -> None:
    records = splits["train"] + splits["heldout"]
    assert len(splits["heldout"]) == HELDOUT
    assert 3600 <= len(records) <= 3700
    assert len({record.image for record in records}) == len(records)
    assert len({record.caption for record in records}) == len(records)
    for record in records[::50]:
        pixels = np.asarray(Image.open(io.BytesIO(record.image)).convert("RGBA"))
        assert pixels.shape == (emoji.SIDE, emoji.SIDE, 4)
        assert pixels[..., 3].max() == 255, "something is drawn"
        assert pixels[0, 0, 3] == 0, "on a transparent ground"


def test_names_keywords_and_chinese(splits: dict[str, list[Record]]) -> None:
    records = splits["train"] + splits["heldout"]
    by_text = {record.meta["emoji"]: record for record in records}
    firefighter = by_text["👩🏽‍🚒"]
    assert firefighter.caption == firefighter.meta["name"] == "woman firefighter: medium skin tone"
    assert firefighter.meta["name_zh"] == "女消防员: 中等肤色"
    assert firefighter.meta["parts"] == ["woman", "firefighter", "medium skin tone"]
    assert by_text["🐱"].meta["group"] == "Animals & Nature"
    assert "cat" in by_text["🐱"].meta["keywords"]
    named = sum(bool(record.meta["name_zh"]) for record in records)
    assert named / len(records) > 0.95


def test_held_out_parts_are_all_known_from_training(splits: dict[str, list[Record]]) -> None:
    trained = Counter(part for r in splits["train"] for part in parts_of(r.caption or "") or [])
    bases = Counter((r.caption or "").partition(": ")[0] for r in splits["train"])
    names = {record.caption for record in splits["train"]}
    for record in splits["heldout"]:
        assert record.caption is not None
        parts = parts_of(record.caption)
        assert parts is not None
        assert len(parts) >= 2
        assert record.caption not in names
        assert all(trained[part] >= LEAST for part in parts), record.caption
        assert bases[record.caption.partition(": ")[0]] >= LEAST, record.caption
        assert record.meta["split"] == "heldout"
    everything = [r.caption or "" for split in splits.values() for r in split]
    assert split_names(everything) == {record.caption for record in splits["heldout"]}
    document = json.loads(
        (Path(resolve_shards("sample:emoji/train")[0]).parents[1] / "split.json").read_text()
    )
    assert set(document["heldout"]) == {record.caption for record in splits["heldout"]}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("thumbs up: dark skin tone", ["thumbs up", "dark skin tone"]),
        ("woman judge: light skin tone", ["woman", "judge", "light skin tone"]),
        ("kiss: man, man", ["kiss", "man", "man"]),
        ("woman: red hair", ["woman", "red hair"]),
        ("flag: France", None),
        ("keycap: 3", None),
        ("red apple", None),
    ],
)
def test_parts(name: str, parts: list[str] | None) -> None:
    assert parts_of(name) == parts


def test_webdataset_reads_them() -> None:
    shard = Path(resolve_shards("sample:emoji/heldout")[0])
    with shard.open("rb") as stream:
        files = list(tar_file_expander([{"url": str(shard), "stream": stream}]))
    names = [file["fname"] for file in files if file]  # an empty one marks the end of a shard
    assert names[:3] == ["000000000.json", "000000000.txt", "000000000.webp"]
    assert len(names) == 3 * HELDOUT


def test_the_command_writes_exactly_these_shards(tmp_path: Path) -> None:
    missing = [package for path, package in emoji.PACKAGES.items() if not path.exists()]
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs Debian's packages {', '.join(missing)}")
    shipped = Path(resolve_shards("sample:emoji/train")[0]).parents[1]
    made_from = json.loads((shipped / "split.json").read_text())["inputs"]
    if emoji.input_digests() != made_from:
        pytest.skip("this machine's font or names are another version than the shards were made from")
    emoji.write_emoji_shards(tmp_path / "emoji")
    for path in sorted((tmp_path / "emoji").rglob("*")):
        if path.is_file() and path.suffix != ".parquet":
            twin = shipped / path.relative_to(tmp_path / "emoji")
            assert path.read_bytes() == twin.read_bytes(), twin.name
