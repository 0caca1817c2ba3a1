"""The list of samples that could not be used: each once, saved and read, and too many stop the run."""

from pathlib import Path

import pytest

from clipkit.errors import ArtifactError, DataError
from clipkit_data.batches.quarantine import BadSample, Quarantine, read_quarantine, write_quarantine


def bad(number: int, reason: str = "picture undecodable") -> BadSample:
    return BadSample(number, "photos", "00000.tar", number, f"k{number}", reason, f"k{number}: 坏 \udcff", 7)


def test_a_bad_sample_is_listed_once() -> None:
    quarantine = Quarantine(known=[bad(1)])
    quarantine.add([bad(1), bad(2), bad(2, "empty caption")], 100)
    assert [found.id for found in quarantine.samples.values()] == [1, 2]
    assert quarantine.counts() == {"picture undecodable": 2}


def test_too_many_stop_with_a_report() -> None:
    quarantine = Quarantine(0.1)
    quarantine.add([bad(n) for n in range(20)], 20)  # so few say nothing yet
    quarantine.add([], 190)
    quarantine.add([bad(20), bad(21)], 10)  # a tenth, to the last sample
    words = r"23 of 221 samples .* 10\.0% .* picture undecodable ×23; the first: 00000\.tar: k0"
    with pytest.raises(DataError, match=words) as caught:
        quarantine.add([bad(20), bad(22)], 1)
    assert "clipkit shards check" in str(caught.value.hint)


def test_with_a_share_of_nothing_the_first_one_stops() -> None:
    with pytest.raises(DataError, match="1 of 1000 samples"):
        Quarantine(0.0).add([bad(1)], 1000)


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\n", "\x1c", "坏"])
def test_any_character_may_stand_in_a_key_or_message(odd: str, tmp_path: Path) -> None:
    sample = BadSample(1, "photos", "00000.tar", 0, f"a{odd}b", "picture undecodable", f"x{odd}y", 7)
    write_quarantine(tmp_path / "q", [sample])
    assert read_quarantine(tmp_path / "q") == [sample]


def test_what_an_earlier_part_of_the_run_found_does_not_count_again() -> None:
    quarantine = Quarantine(0.01, known=[bad(n) for n in range(50)])
    quarantine.add([bad(3), bad(60)], 10)
    assert len(quarantine.samples) == 51


def test_the_file_holds_the_list(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    assert read_quarantine(path) == []
    write_quarantine(path, [bad(2), bad(1)])
    assert [found.id for found in read_quarantine(path)] == [1, 2]
    assert read_quarantine(path)[0].shard == "00000.tar"
    write_quarantine(path, [])
    assert not path.exists()
    path.write_text("{}\n")
    with pytest.raises(ArtifactError, match="no list of bad samples"):
        read_quarantine(path)
