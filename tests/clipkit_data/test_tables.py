"""Tables: no row is lost without a word, and no value becomes another one."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import DataError, InputError
from clipkit_data.tables import read_table

STRAY = '"Just a quote at the start, 5 feet tall'


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a table without faults."""
    found = list(read_table(path))
    assert [fault for _, fault in found if fault] == []
    return [row for row, _ in found]


def captions_of(path: Path) -> list[str]:
    return [row["caption"] for row in rows_of(path)]


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Rows written as they are: nothing is quoted."""
    mark = "\t" if path.suffix == ".tsv" else ","
    path.write_text("".join(mark.join(row) + "\n" for row in (header, *rows)), encoding="utf-8")
    return path


def column(folder: Path, values: Sequence[str]) -> list[Any]:
    """What becomes of a column's values."""
    path = table(folder / "t.csv", ("path", "caption", "x"), [("a.png", "a", value) for value in values])
    return [row["x"] for row in rows_of(path)]


@pytest.mark.parametrize("stray", [STRAY, '"A" and "B"', 'he is 6"', '"', '"a"b"', "5'6\" tall"])
def test_a_stray_quote_in_a_tsv_is_a_character(tmp_path: Path, stray: str) -> None:
    captions = [f"caption {number}" for number in range(1000)]
    captions[10], captions[20], captions[30] = stray, 'he said: "', "fine"
    rows = [(f"{number}.png", caption) for number, caption in enumerate(captions)]
    assert captions_of(table(tmp_path / "t.tsv", ("path", "caption"), rows)) == captions
    assert captions_of(table(tmp_path / "t.tsv", ('"path"', '"caption"'), rows)) == captions
    three = [(*row, "x") for row in rows]
    assert captions_of(table(tmp_path / "t.tsv", ("path", "caption", "note"), three)) == captions


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("header", [["path", "caption", "note"], ["caption", "path", "note"]])
def test_a_tsv_that_was_quoted_reads_right(tmp_path: Path, quoting: int, header: list[str]) -> None:
    """As `to_csv(sep="\\t")` writes: a field with a tab, a quote or a line break in it stands in quotes."""
    captions = [
        "plain",
        'a "word" here',
        '"all of it"',
        "a\ttab",
        "two\nlines",
        '"',
        "three\n\nlines",
        'a"\tb',
    ]
    with (tmp_path / "t.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, delimiter="\t", quoting=quoting)  # pyright: ignore[reportArgumentType]
        writer.writeheader()
        writer.writerows({"path": "a.png", "caption": text, "note": "n"} for text in captions)
    assert captions_of(tmp_path / "t.tsv") == captions


@given(st.lists(st.tuples(*[st.text("ab,\" \t\r\n'é红", max_size=8)] * 2), max_size=6))
def test_what_a_csv_writer_wrote_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "caption", "note"), *(("a.png", *row) for row in rows)])
    found = [(row["caption"], row["note"] or "") for row in rows_of(path)]
    assert found == [(caption.strip(), note) for caption, note in rows]


def test_a_quote_that_is_not_closed_costs_one_row_of_a_csv(tmp_path: Path) -> None:
    rows = [(f"{number}.png", f"caption {number}") for number in range(1000)]
    rows[10] = ("10.png", '"a quote at the start')
    rows[500] = ("500.png", '"quoted, and right"')
    rows[700] = ("700.png", '"text" after a quote')
    rows[998] = ("998.png", '"open')
    found = list(read_table(table(tmp_path / "t.csv", ("path", "caption"), rows)))
    faults = {place: fault for place, (_, fault) in enumerate(found) if fault}
    assert list(faults) == [10, 700, 998]
    assert {reason for reason, _ in faults.values()} == {"invalid csv"}
    assert [detail.split(":")[0] for _, detail in faults.values()] == ["line 12", "line 702", "line 1000"]
    assert "a quote at the start" in faults[10][1]
    assert "opens here" in faults[10][1]
    assert "opens here" not in faults[700][1]
    kept = [row["path"] for row, fault in found if not fault]
    assert kept == [f"{number}.png" for number in range(1000) if number not in faults]
    assert found[500][0]["caption"] == "quoted, and right"


def test_a_quote_that_runs_into_too_many_columns_costs_one_row(tmp_path: Path) -> None:
    rows = [("0.png", '"open'), ("1.png", "a"), ("2.png", 'he is 6", they say'), ("3.png", "b")]
    found = list(read_table(table(tmp_path / "t.csv", ("path", "caption"), rows)))
    assert [row.get("caption") for row, _ in found] == [None, "a", None, "b"]
    assert [fault[0] for _, fault in found if fault] == ["wrong number of columns"] * 2
    assert [fault[1].split(":")[0] for _, fault in found if fault] == ["line 2", "line 4"]


@pytest.mark.parametrize("header", [("path", "caption"), ("caption", "path")])
def test_two_stray_quotes_take_no_rows_of_a_csv_between_them(tmp_path: Path, header: tuple[str, str]) -> None:
    captions = [f"caption {number}" for number in range(100)]
    captions[10], captions[60], captions[70] = STRAY, 'he is 6"', '"two, lines\nand, more, text"'
    rows = [{"path": f"{number}.jpg", "caption": caption} for number, caption in enumerate(captions)]
    found = list(
        read_table(table(tmp_path / "t.csv", header, [[row[name] for name in header] for row in rows]))
    )
    assert [place for place, (_, fault) in enumerate(found) if fault] == [10]
    kept = [row["caption"] for row, fault in found if not fault]
    assert kept == [*captions[:10], *captions[11:70], captions[70].strip('"'), *captions[71:]]


def test_a_million_characters_without_an_end(tmp_path: Path) -> None:
    """A quote is looked for some way only, so that many of them cost no more than the file is long."""
    rows = [(f"{number}.png", '"open' if number % 5000 == 0 else "x" * 90) for number in range(20_000)]
    found = list(read_table(table(tmp_path / "t.csv", ("path", "caption"), rows)))
    assert [place for place, (_, fault) in enumerate(found) if fault] == [0, 5000, 10_000, 15_000]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    mark = "\t" if suffix == "tsv" else ","
    for end in ("\n", "\r\n", "\r"):
        lines = ["", f"path{mark}caption", "", f"a.png{mark}a", f"b.png{mark}b\u2028c", ""]
        (tmp_path / f"t.{suffix}").write_bytes(end.join(lines).encode("utf-8-sig"))
        assert captions_of(tmp_path / f"t.{suffix}") == ["a", "b\u2028c"]


@pytest.mark.parametrize(
    "values",
    [
        ["02134", "10001"],
        ["12345678901234567890", "1"],
        ["12345e12", "12345e13"],
        ["1.10", "1.9"],
        ["0.12345678901234567890"],
        ["+5"],
        ["1_000"],
        [" 7"],
        ["18446744073709551616"],
        ["9" * 400],
        ["123456789012345678901234567890"],
        ["1", "1e400"],
        ["٣"],
        ["1", "x"],
        ["nan", "inf"],
        ["9" * 5000],
        ["true", "false"],
        ["2020-01-02T10:00:00Z"],
        ["1", "x", ""],
    ],
)
def test_what_a_number_would_change_stays_text(tmp_path: Path, values: list[str]) -> None:
    assert column(tmp_path, values) == values


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (["3", "-4", "", "0"], [3, -4, None, 0]),
        (["9223372036854775807"], [2**63 - 1]),
        (["0.5", "1", "1e-05", "2.0"], [0.5, 1.0, 1e-05, 2.0]),
        (["0.3100", "-1.2000", ""], [0.31, -1.2, None]),
        (["", ""], [None, None]),
    ],
)
def test_what_can_be_written_back_becomes_numbers(
    tmp_path: Path, values: list[str], numbers: list[Any]
) -> None:
    found = column(tmp_path, values)
    assert found == numbers
    assert [type(value) for value in found] == [type(value) for value in numbers]


def test_captions_and_paths_stay_text(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", ("path", "caption"), [("7", "007"), ("8", "1.50")])
    assert [(row["path"], row["caption"]) for row in rows_of(path)] == [("7", "007"), ("8", "1.50")]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_row_that_is_not_utf8_is_a_fault_whatever_the_column(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    mark = b"\t" if suffix == "tsv" else b","
    lines = [b"path,caption,place", b"a.png,a,K\xf6ln", b"b.png,b,K\xc3\xb6ln", b"\xe9.png,c,x"]
    path.write_bytes(b"\n".join(line.replace(b",", mark) for line in lines))
    (first, wrong), (second, right), (third, also_wrong) = read_table(path)
    assert wrong == ("place is not UTF-8", "line 2: K\ufffdln")
    assert (second["place"], right) == ("Köln", None)
    assert also_wrong is not None
    assert also_wrong[0] == "path is not UTF-8"
    assert json.dumps([first, third], ensure_ascii=False).encode()


def test_columns_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path,caption,,\na.png,a,,\nb.png,b,\xe9,\n")
    (first, _), (_, fault) = read_table(tmp_path / "t.csv")
    assert (first["caption"], fault) == ("a", (" is not UTF-8", "line 3: \ufffd"))


def test_a_header_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for content, words in (
        ("path,caption\na,b\n".encode("utf-16"), "not UTF-8"),
        ("path,caption,größe\n".encode("latin-1"), "not UTF-8"),
        (b'path,"caption\na,b\n', "line 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            list(read_table(path))
    path.write_text("path,caption,a,a\nx,y,1,2\n")
    with pytest.raises(InputError, match="two columns 'a'"):
        list(read_table(path))


def test_faults_stand_where_their_rows_stand(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", ("path", "caption"), [("a", "b", "c"), ("d", "e"), ("f",), ("", "g")])
    assert [fault and fault[0] for _, fault in read_table(path)] == [
        "wrong number of columns",
        None,
        "wrong number of columns",
        "missing path",
    ]
    pq.write_table(pa.table({"path": ["a", None, "b"], "caption": ["x", "y", "z"]}), tmp_path / "t.parquet")
    assert [fault and fault[0] for _, fault in read_table(tmp_path / "t.parquet")] == [
        None,
        "missing path",
        None,
    ]
