"""Tokenizers: equal to open_clip's, bounded, trimmed exactly, pickled, saved."""

import pickle
import time
from pathlib import Path

import open_clip
import pytest
import torch

from clipkit.errors import ConfigError, DependencyError, NotFoundError
from clipkit.text import ClipTokenizer, build_tokenizer, trim

TEXTS = ["a photo of a cat", "", "  ", "Café &amp; 红苹果 🍎!!", "x" * 300, "word " * 300]


@pytest.mark.parametrize("length", [8, 32, 77])
def test_equals_open_clips_tokenizer(length: int) -> None:
    ours = build_tokenizer({"name": "clip", "context_length": length})
    ids = ours.encode(TEXTS)
    assert torch.equal(ids, open_clip.SimpleTokenizer(context_length=length)(TEXTS))
    assert ids.dtype == torch.int64
    assert (ours.vocab_size, ours.eos_id, ours.pad_id, ours.context_length) == (49408, 49407, 0, length)
    assert (ids == ours.eos_id).any(dim=1).all(), "a cut text keeps its end token"


def test_other_cleaning_equals_open_clips() -> None:
    ours = build_tokenizer({"name": "clip", "clean": "canonicalize"})
    assert torch.equal(ours.encode(TEXTS), open_clip.SimpleTokenizer(clean="canonicalize")(TEXTS))


def test_no_texts() -> None:
    assert tuple(ClipTokenizer(16).encode([]).shape) == (0, 16)


def test_a_very_long_word_takes_bounded_time() -> None:
    started = time.perf_counter()
    ClipTokenizer(16).encode(["ab" * 500_000])
    assert time.perf_counter() - started < 5


def test_config_builds_an_equal_one_and_it_pickles() -> None:
    ours = ClipTokenizer(20, "whitespace")
    again = build_tokenizer(ours.config())
    copied = pickle.loads(pickle.dumps(ours))
    for other in (again, copied):
        assert other.identity() == ours.identity()
        assert torch.equal(other.encode(TEXTS), ours.encode(TEXTS))
    assert len(pickle.dumps(ours)) < 300
    assert ClipTokenizer(21).identity() != ours.identity()


def test_the_word_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.text._MAX_CACHED_WORDS", 100)
    tokenizer = ClipTokenizer(16)
    before = tokenizer.encode(TEXTS)
    for start in range(0, 500, 50):
        tokenizer.encode([f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(start, start + 50)])
    assert len(tokenizer._simple.cache) < 300
    assert torch.equal(tokenizer.encode(TEXTS), before)


def test_trim_keeps_every_token_and_rounds_up() -> None:
    ids = torch.zeros(3, 32, dtype=torch.int64)
    ids[0, :5], ids[1, :9], ids[2, :1] = 7, 7, 7
    assert trim(ids, 0).shape == (3, 16)
    assert trim(ids, 0, multiple=1).shape == (3, 10)
    assert trim(ids[2:], 0).shape == (1, 8)
    assert trim(torch.full((2, 32), 7), 0).shape == (2, 32)
    assert trim(torch.zeros(2, 32, dtype=torch.int64), 0).shape == (2, 8)
    assert trim(ids[:0], 0).shape == (0, 32)
    assert trim(ids[:, :5], 0, multiple=8).shape == (3, 5)


def test_trim_keeps_an_end_token_that_is_also_padding() -> None:
    ids = torch.tensor([[5, 6, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]])
    assert (trim(ids, 9, multiple=1) == 9).sum() == 1


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({}, ConfigError, "tokenizer.name: missing"),
        ({"name": "klingon"}, NotFoundError, "known: clip, open_clip, hf"),
        ({"name": "clip", "context_length": 2}, ConfigError, "context_length"),
        ({"name": "clip", "length": 2}, ConfigError, "length: unknown key"),
    ],
)
def test_wrong_configurations(config: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_tokenizer(config)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="cannot load the tokenizer"):
        build_tokenizer({"name": "hf", "source": str(tmp_path)})
