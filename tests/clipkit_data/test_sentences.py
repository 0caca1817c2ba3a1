"""Graded pairs of captions: the Jaccard index of keywords, the same pairs for the same seed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import DataError
from clipkit_data.dataset import ShardDataset
from clipkit_data.lines import LineDataset
from clipkit_data.records import Record
from clipkit_data.sources import resolve_shards
from clipkit_data.tools.sentences import GradedPair, graded_pairs, write_pairs


def sample(caption: str | None, keywords: Any) -> Record:
    return Record((0, 0), "key", b"", caption, {"keywords": keywords})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=2, max_size=9), st.integers(1, 40))
def test_every_score_is_the_share_of_common_keywords(sets: list[set[str]], count: int) -> None:
    words = {f"caption {number}": own for number, own in enumerate(sets)}
    pairs = graded_pairs((sample(name, sorted(own)) for name, own in words.items()), count=count)
    possible = len(sets) * (len(sets) - 1) // 2
    assert len(pairs) == min(count, possible)
    assert len({frozenset(pair[:2]) for pair in pairs}) == len(pairs)
    for one, other, score in pairs:
        a, b = words[one], words[other]
        assert one != other
        assert score == pytest.approx(len(a & b) / len(a | b))


def test_half_of_the_pairs_share_a_keyword() -> None:
    heldout = ShardDataset(resolve_shards("sample:emoji/heldout"))
    records = [heldout[position] for position in range(len(heldout))]
    pairs = graded_pairs(records, "keywords_zh", count=2000, seed=1)
    assert sum(score > 0 for *_, score in pairs) == 1000
    assert pairs == graded_pairs(records, "keywords_zh", count=2000, seed=1)
    assert pairs != graded_pairs(records, "keywords_zh", count=2000, seed=2)


def test_samples_without_captions_or_keywords_make_no_pairs() -> None:
    some = [sample("one", ["a"]), sample(None, ["a"]), sample("two", "a"), sample("three", [])]
    with pytest.raises(DataError, match="two captions with a list of texts in 'keywords', there are 1"):
        graded_pairs(some)
    assert graded_pairs([*some, sample("four", ["a", 3, "b"])]) == [GradedPair("one", "four", 0.5)]


def test_a_table_of_pairs_is_read_again(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.tsv", [GradedPair("one\ttwo", '"three"', 0.25), GradedPair("a", "b\nc", 0)])
    dataset = LineDataset([tmp_path / "pairs.tsv"])
    rows = [dataset[position].meta for position in range(2)]
    assert rows == [
        {"sentence1": "one two", "sentence2": '"three"', "score": "0.25"},
        {"sentence1": "a", "sentence2": "b c", "score": "0"},
    ]
