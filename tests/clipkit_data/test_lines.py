"""Files of sentences as a data set: each line is the one that `str.split` or `csv` finds, or a fault."""

import csv
import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import DataError, InputError, NotFoundError
from clipkit.text import build_tokenizer
from clipkit_data import lines
from clipkit_data.batches.content import Texts
from clipkit_data.batches.loader import TrainBatches
from clipkit_data.batches.pairs import EvalBatches
from clipkit_data.dataset import ShardDataset
from clipkit_data.lines import LineDataset
from clipkit_data.records import RecordError
from clipkit_data.sources import open_dataset

NLI = 'sent0,sent1,hard_neg\n"A man, a plan","A ""man""",No man\nTwo,"on\ntwo lines",three\n'
# what str.splitlines takes for the end of a line beside "\n", no file of lines does
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n\r"), max_size=12)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def samples_of(path: Path) -> Any:
    """For what is annotated with the shards that it was first written for."""
    return LineDataset([path])


def captions(dataset: LineDataset) -> list[str | None]:
    return [dataset[position].caption for position in range(len(dataset))]


def test_each_line_of_a_text_is_a_sample_named_by_its_number(tmp_path: Path) -> None:
    dataset = LineDataset([write(tmp_path, "a.txt", "one two\r\n\n  \nthree\u2028四 \nlast")])
    assert captions(dataset) == ["one two", "three\u2028四", "last"]
    assert [dataset.key(position) for position in range(3)] == ["1", "4", "5"]
    assert dataset.empty == 2
    record = dataset[1]
    assert (record.id, record.key, record.image, record.meta) == ((0, 1), "4", b"", {})
    with pytest.raises(IndexError):
        dataset[3]


@settings(deadline=None, max_examples=50)
@given(lines_=st.lists(TEXT, max_size=30), chunk=st.integers(1, 40), bom=st.booleans(), end=st.booleans())
def test_any_text_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, lines_: list[str], chunk: int, bom: bool, end: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "any.txt"
    text = "\ufeff" * bom + "\n".join(lines_) + "\n" * end
    path.write_bytes(text.encode())
    expected = [line for row in text.split("\n") if (line := row.removeprefix("\ufeff").strip())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)  # lines that run over the edge of a piece
        if not expected:
            with pytest.raises(DataError, match="no line holds a sentence"):
                LineDataset([path])
            return
        assert captions(LineDataset([path])) == expected


FIELD = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=8)


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=12), chunk=st.integers(1, 40))
def test_any_rows_that_csv_writes_are_read_again(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], chunk: int
) -> None:
    path, text = tmp_path_factory.mktemp("any") / "any.csv", io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    path.write_bytes(text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_CHUNK", chunk)
        dataset = LineDataset([path])
    found = [dataset[position].meta for position in range(len(dataset))]
    assert found == [{"a": a.strip(), "b": b.strip()} for a, b in rows]


def test_the_first_column_is_the_caption_and_all_are_metadata(tmp_path: Path) -> None:
    dataset = LineDataset([write(tmp_path, "nli.csv", NLI)])
    assert captions(dataset) == ["A man, a plan", "Two"]
    assert dataset[0].meta == {"sent0": "A man, a plan", "sent1": 'A "man"', "hard_neg": "No man"}
    assert dataset[1].meta["sent1"] == "on\ntwo lines"


def test_a_column_named_caption_is_the_caption(tmp_path: Path) -> None:
    tsv = write(tmp_path, "a.tsv", 'score\tcaption\n4.5\ta "quoted word and more\n')
    rows = [{"id": 7, "caption": "text 七"}, {"caption": "other", "tags": ["x"]}]
    jsonl = write(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    dataset = LineDataset([tsv, jsonl])
    assert captions(dataset) == ['a "quoted word and more', "text 七", "other"]
    assert dataset[0].meta["score"] == "4.5"
    assert dataset[2].meta == rows[1]
    assert dataset.sizes.tolist() == [1, 2]
    assert [dataset.locate(position) for position in range(3)] == [(0, 0), (1, 0), (1, 1)]
    assert dataset.sample_id(2) == (1 << 32) + 1


def test_a_line_that_is_not_utf8_is_a_fault_with_file_line_and_byte(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, "a.txt", b"good\nbad \xff\nfine\n\xc3\n")
    with caplog.at_level(logging.WARNING):
        dataset = LineDataset([path])
    assert captions(dataset) == ["good", "fine"]
    found = [(fault.shard, fault.sample, fault.offset, fault.reason) for fault in dataset.faults]
    reason = "caption is not UTF-8"
    assert found == [(str(path), "2", 9, reason), (str(path), "4", 16, reason)]
    assert "2 lines are not UTF-8" in caplog.text
    assert f"{path}, line 2 (byte 9)" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "reason", "words"),
    [
        ("a.tsv", "a\tb\n1\t2\n1\t2\t3\n", "wrong number of columns", "line 3 (byte 8): 3 columns"),
        ("a.csv", 'a,b\n1,2\n1,"2"3\n', "invalid csv", "line 3"),
        ("a.jsonl", '{"a": "1"}\n{"a": \n', "invalid json", "line 2"),
        ("a.jsonl", '{"a": "1"}\n["a"]\n', "invalid json", "not list"),
        ("a.jsonl", '{"a": "1"}\n{"a": 3}\n', "missing caption", "'a' holds no text"),
        ("a.jsonl", '{"a": "1"}\n{"b": "3"}\n', "missing caption", "'a' holds no text"),
    ],
)
def test_a_broken_row_is_an_error_of_that_sample_alone(
    tmp_path: Path, name: str, content: str, reason: str, words: str
) -> None:
    dataset = LineDataset([write(tmp_path, name, content)])
    assert dataset[0].caption == "1"
    with pytest.raises(RecordError) as caught:
        dataset[1]
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no such file: .*gone\.txt"):
        open_dataset(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="must lie on this machine"):
        open_dataset("https://example.org/corpus.txt")
    with pytest.raises(InputError, match="not a file of sentences"):
        LineDataset([write(tmp_path, "a.parquet", "x")])
    with pytest.raises(DataError, match="no line holds a sentence"):
        LineDataset([write(tmp_path, "empty.txt", "")])
    with pytest.raises(DataError, match="no line holds a sentence"):
        LineDataset([write(tmp_path, "head.tsv", "a\tb\n")])
    for name, head in (("a.csv", "a,a\n"), ("b.tsv", "a\t\n"), ("c.jsonl", "[1]\n"), ("d.csv", "\n")):
        with pytest.raises(InputError, match="the first line"):
            LineDataset([write(tmp_path, name, head + "1,2\n")])


def test_a_quote_that_is_never_closed_does_not_take_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_CHUNK", 64)
    monkeypatch.setattr(lines, "_LONGEST", 256)
    path = write(tmp_path, "a.csv", 'a,b\n1,"2\n' + "3,4\n" * 500)
    with pytest.raises(DataError, match="line at byte 4 is longer") as caught:
        LineDataset([path])
    assert caught.value.hint is not None
    assert "never closed" in caught.value.hint


def test_a_file_that_changed_since_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\ntwo\n")
    dataset = LineDataset([path])
    assert dataset[0].caption == "one"
    dataset.close()
    write(tmp_path, "a.txt", "one\ntwo\nthree\n")
    with pytest.raises(DataError, match="changed after it was opened"):
        dataset[0]


def test_the_fingerprint_follows_names_and_contents(tmp_path: Path) -> None:
    one = LineDataset([write(tmp_path, "a.txt", "one\ntwo\n")])
    (tmp_path / "other").mkdir()
    moved = LineDataset([write(tmp_path / "other", "a.txt", "one\ntwo\n")])
    changed = LineDataset([write(tmp_path / "other", "a.txt", "one\ntwp\n")])
    assert one.fingerprint() == moved.fingerprint()
    assert one.fingerprint() != changed.fingerprint()
    (entry,) = one.manifest()
    assert (entry["name"], entry["bytes"], entry["samples"], entry["faults"]) == ("a.txt", 8, 2, 0)
    assert one.shard_names == ["a.txt"]


def test_no_open_file_travels_to_another_process(tmp_path: Path) -> None:
    dataset = LineDataset([write(tmp_path, "a.txt", "one\ntwo\n")])
    assert dataset[1].caption == "two"
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert copy[0].caption == "one"
    assert dataset[0].caption == "one"


def test_a_pattern_stands_for_several_files_and_shards_stay_shards(tmp_path: Path, shards: Path) -> None:
    for number in range(3):
        write(tmp_path, f"part-{number}.txt", f"sentence {number}\n")
    assert len(open_dataset(str(tmp_path / "part-{0..2}.txt"))) == 3
    dataset = open_dataset(tmp_path / "part-*.txt", name="parts")
    assert isinstance(dataset, LineDataset)
    assert (len(dataset), dataset.name) == (3, "parts")
    assert isinstance(open_dataset(shards), ShardDataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_tokens_of_every_column_that_is_asked_for(tmp_path: Path, workers: int) -> None:
    rows = "".join(f"sentence {n}\tmeans {n}\tnot {n}\n" for n in range(40))
    head, broken = "sent0\tsent1\thard_neg\n", "bad row\nx\t\tz\n"
    dataset = samples_of(write(tmp_path, "a.tsv", head + rows + broken))
    tokenizer = build_tokenizer({"name": "clip", "context_length": 16})
    batches = TrainBatches(
        dataset, Texts(), tokenizer, batch_size=16, workers=workers, more_captions=("sent1", "hard_neg")
    )
    seen, reasons = set[int](), set[str]()
    for _, batch in zip(range(6), batches, strict=False):
        numbers = [position if position < 40 else None for position in batch.index.tolist()]
        assert None not in numbers
        for ids, words in zip((batch.ids, *batch.more_ids), ("sentence", "means", "not"), strict=True):
            expected = tokenizer.encode([f"{words} {n}" for n in numbers])
            np.testing.assert_array_equal(ids.numpy(), expected[:, : ids.shape[1]].numpy())
        seen |= set(batch.index.tolist())
        reasons |= {fault.reason for fault in batch.faults}
    assert seen == set(range(40))
    assert reasons == {"wrong number of columns", "no sent1"}


def test_evaluation_reads_every_sentence_once_in_order(tmp_path: Path) -> None:
    dataset = samples_of(write(tmp_path, "a.txt", "".join(f"line {n}\n" for n in range(10))))
    parts = list(EvalBatches(dataset, Texts(), batch_size=4))
    assert [caption for part in parts for caption in part.captions] == [f"line {n}" for n in range(10)]
