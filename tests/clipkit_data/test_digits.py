"""The digits' shards: scikit-learn's pictures, unchanged, and a fair fifth of them held out."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from clipkit.cli import main
from clipkit.errors import ArtifactError
from clipkit_data.dataset import ShardDataset
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.digits import held_out, write_digit_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "shards"
    write_digit_shards(out)
    return out


def read(folder: Path) -> list[Record]:
    dataset = ShardDataset(resolve_shards(folder))
    assert dataset.faults == []
    records = [dataset[position] for position in range(len(dataset))]
    dataset.close()
    return records


def test_the_pictures_and_labels_are_those_of_scikit_learn(folder: Path) -> None:
    ink_NP, labels_N = load_digits(return_X_y=True)
    records = read(folder / "train") + read(folder / "heldout")
    assert sorted(record.meta["index"] for record in records) == list(range(len(labels_N)))
    for record in records:
        place = record.meta["index"]
        pixels = np.asarray(Image.open(io.BytesIO(record.image)))
        assert pixels.shape == (8, 8)
        assert np.array_equal(np.round(pixels.ravel() / 255 * 16), ink_NP[place])
        assert record.meta["label"] == record.meta["cls"] == str(labels_N[place])


def test_a_fifth_of_each_digit_is_held_out(folder: Path) -> None:
    train, heldout = (Counter(r.meta["label"] for r in read(folder / s)) for s in ("train", "heldout"))
    assert set(train) == set(heldout) == set("0123456789")
    for label, count in heldout.items():
        assert count == round(0.2 * (count + train[label]))


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_pictures_does_not_decide_what_is_held_out(random: np.random.Generator) -> None:
    ink_NP, labels_N = load_digits(return_X_y=True)
    pixels_N88, order = ink_NP.reshape(-1, 8, 8).astype(np.uint8), list(range(len(labels_N)))
    random.shuffle(order)
    expected = held_out(pixels_N88, labels_N)
    assert {order[place] for place in held_out(pixels_N88[order], labels_N[order])} == expected


def test_the_command_makes_shards_that_are_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    assert main(["shards", "digits", str(out), "--json"]) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["samples"] == {"train": 1438, "heldout": 359}
    assert said == f"{out}: 1438 samples in train, 359 samples in heldout\n"
    assert main(["shards", "check", str(out / "heldout")]) == 0
    with pytest.raises(ArtifactError, match="already exists"):
        write_digit_shards(out)
