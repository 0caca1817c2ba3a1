"""Conditions on samples: SQLite's language over a sample's columns and its `.json`, and nothing else."""

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit_data.tools.columns import Columns
from clipkit_data.tools.where import Where


def columns(**other: Any) -> Columns:
    values: dict[str, Any] = {"key": "000", "caption": "a cat", "words": 2, "characters": 5, "bytes": 900}
    values |= {"format": "JPEG", "width": 300, "height": 100, "aspect": 3.0, "picture": b""}
    return Columns(**(values | other))


META = {
    "stars": 4,
    "similarity": "0.31",
    "group": "pets",
    "tags": ["a", "b"],
    "exif": {"iso": 100},
    "ok": True,
}


@pytest.mark.parametrize(
    "condition",
    [
        "width >= 256 and aspect < 3.5",
        "caption like '%CAT%'",
        "caption regexp '^a c.t$'",
        "format in ('JPEG', 'PNG')",
        "stars between 3 and 5",
        "similarity > 0.3 and similarity < 0.32",
        "\"group\" = 'pets'",
        "json ->> '$.exif.iso' = 100",
        "tags like '%\"b\"%'",
        "ok",
        "absent is null and stars is not null",
        "length(caption) = characters -- a remark",
        "caption <> 'say \"hello\"'",
    ],
)
def test_conditions_that_hold(condition: str) -> None:
    assert Where(condition).holds([(columns(), META)]) == [True]
    assert Where(f"not ({condition}\n)").holds([(columns(), META)]) == [False]


@given(
    values=st.lists(
        st.one_of(st.none(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False)), max_size=8
    ),
    bound=st.integers(-(2**31), 2**31),
    sign=st.sampled_from(["<", "<=", ">", ">=", "="]),
)
def test_numbers_compare_as_in_python(values: list[float | None], bound: int, sign: str) -> None:
    compare = {"=": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[
        sign
    ]
    rows = [(columns(), {} if value is None else {"stars": value}) for value in values]
    expected = [value is not None and compare(value, bound) for value in values]
    assert Where(f"stars {sign} {bound}").holds(rows) == expected


@given(st.dictionaries(st.text(), st.text() | st.lists(st.integers()) | st.booleans()), st.text())
def test_any_text_can_stand_in_a_sample(meta: dict[str, Any], caption: str) -> None:
    row = columns(caption=caption), {**meta, "name": "\ud800"}
    assert Where("name is not null and width = 300").holds([row]) == [True]


def test_an_unknown_field_is_null_and_its_sample_dropped() -> None:
    where = Where("stars > 3")
    assert where.fields == ["stars"]
    assert where.holds([(columns(), {}), (columns(), {"stars": 4})]) == [False, True]
    where.check_fields({"stars"})
    with pytest.raises(InputError, match=r"'stars'.*fields: colour"):
        where.check_fields({"colour"})


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("width >", "syntax error"),
        ("", "syntax error"),
        ("width = 1); drop table samples; --", "one statement"),
        ("width = (select 1 from sqlite_master where name = outer.b)", "no such column: outer.b"),
        ("lenght(caption) > 3", "no such function: lenght"),
        ("exif.iso = 100", "no such column: exif.iso"),
        ("load_extension('x')", "not authorized"),
        ("key = (select max(key) from samples)", "SELECT or VALUES of its own (a condition sees one sample"),
        ("exists (select 1)", "SELECT or VALUES of its own"),
        ("key = max(key)", "misuse of aggregate"),
        ("row_number() over () = 1", "misuse of window function"),
        ("1) group by key having (key = max(key)", "syntax error"),
        ("1) limit (1", "syntax error"),
        ("caption regexp '('", "'(' is no regular expression: missing )"),
        ("width > 3 and caption regexp '['", "'[' is no regular expression"),
        ("caption regexp 'a{99999999999}'", "is no regular expression"),
        ("samples.rowid = 1", "no such column: samples.rowid"),
    ],
)
def test_what_is_no_condition(condition: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        Where(condition)
    assert words in str(refused.value)


def test_a_mistake_that_only_shows_with_data() -> None:
    where = Where("caption regexp pattern")
    assert where.holds([(columns(), {"pattern": "c.t"}), (columns(), {})]) == [True, False]
    with pytest.raises(InputError, match=r"'a\(' is no regular expression: missing \)"):
        where.holds([(columns(), {"pattern": "a("})])


@pytest.mark.parametrize("name", ["rowid", "oid", "_rowid_", "ROWID"])
def test_sqlites_own_names_are_fields_of_the_json(name: str) -> None:
    where = Where(f"{name} = 7")
    assert where.fields == [name]
    assert where.holds([(columns(), {name: 7}), (columns(), {name: 1}), (columns(), {})]) == [
        True,
        False,
        False,
    ]


def test_what_no_json_can_hold_in_one_sample_does_not_concern_the_others() -> None:
    odd = {"n": {"x": float("nan")}, "tags": [float("-inf"), 1], "stars": float("nan"), "name": "\ud800"}
    rows = [(columns(), {"n": {"x": 1}, "tags": [0, 1]}), (columns(), odd)]
    assert Where("json ->> '$.n.x' = 1").holds(rows) == [True, False]
    assert Where("json ->> '$.n.x' is null and stars is null").holds(rows) == [False, True]
    assert Where("tags ->> '$[1]' = 1").holds(rows) == [True, True]
    assert Where("json ->> '$.name' regexp '^.$'").holds(rows) == [False, True]


def test_a_sample_without_a_picture_has_no_width() -> None:
    nothing = dict.fromkeys(("bytes", "format", "width", "height", "aspect", "picture"))
    rows = [(columns(), {}), (columns(**nothing), {})]
    assert Where("width > 0 or bytes > 0 or aspect >= 1 or format <> ''").holds(rows) == [True, False]
    assert Where("width is null and words = 2").holds(rows) == [False, True]
