"""Folders of shards in the making: nothing half-written, and a killed run goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipkit.errors import ArtifactError, ConfigError, DataError, MismatchError
from clipkit_data.shards.writing import entry, sample_key, shard_name, write_shard
from clipkit_data.tools.job import Advance, each, jobs_or_cores, shards_job
from clipkit_data.tools.pack import pack


@pytest.fixture
def photos(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(10):
        (tmp_path / f"photos/{number}.png").write_bytes(picture(number))
    (tmp_path / "photos/3.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KILLED = """
import os, signal, sys
from clipkit_data.tools.pack import pack
rows = 0
def advance(amount):
    global rows
    rows += amount
    if rows == 5:
        os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], sys.argv[2], per_shard=2, jobs=1, progress=advance)
"""


def test_a_killed_run_is_continued_and_gives_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "whole", per_shard=2, jobs=1)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(photos), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / ".out.partial"
    finished = {path: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert {path.name for path in finished} == {"00000.tar", "00001.tar"}
    assert list(partial.glob(".*.part")), "it was killed while it wrote the third"
    seen: list[int] = []
    result = pack(photos, out, per_shard=2, jobs=1, progress=seen.append)
    assert result == {"samples": 9, "shards": 5, "faults": {"picture format": 1}, "out": str(out)}
    assert sum(seen) == 10
    for path, time in finished.items():
        assert (out / path.name).stat().st_mtime_ns == time
    assert content(out) == content(tmp_path / "whole")
    assert not partial.exists()


def test_an_interrupted_run_of_several_processes_is_continued(photos: Path, tmp_path: Path) -> None:
    def interrupt(rows: int) -> None:
        if rows:
            raise KeyboardInterrupt

    pack(photos, tmp_path / "whole", per_shard=2, jobs=1)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out", per_shard=2, jobs=2, progress=interrupt)
    assert (tmp_path / ".out.partial/.job/shard_0.json").is_file()
    pack(photos, tmp_path / "out", per_shard=2, jobs=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_was_begun_otherwise_is_refused(photos: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def stop(rows: int) -> None:
        seen.append(rows)
        if sum(seen) == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        pack(photos, tmp_path / "out", per_shard=2, jobs=1, progress=stop)
    before = content(tmp_path / ".out.partial")
    with pytest.raises(MismatchError, match="begun with another per shard"):
        pack(photos, tmp_path / "out", per_shard=3)
    (photos / "new.png").write_bytes((photos / "1.png").read_bytes())
    with pytest.raises(MismatchError, match="begun with another source") as refused:
        pack(photos, tmp_path / "out", per_shard=2)
    assert "remove that folder" in str(refused.value)
    assert content(tmp_path / ".out.partial") == before


def test_captions_that_came_later_are_not_mixed_with_old_ones(photos: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(photos), str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    for number in range(10):
        (photos / f"{number}.txt").write_text(f"a caption of {number}")
    with pytest.raises(MismatchError, match="begun with another source"):
        pack(photos, tmp_path / "out", per_shard=2)


def test_a_link_stays_one_and_what_it_names_is_made(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    (tmp_path / "disk/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    (tmp_path / "new link").symlink_to("disk/not yet")
    for name, real in (("link", "disk/real"), ("new link", "disk/not yet"), ("new/../plain", "plain")):
        with shards_job(tmp_path / name, {}) as job:
            assert job.folder.parent == (tmp_path / real).parent
            job.run(Make(picture, None), 1)
        assert (tmp_path / real / "00000.tar").is_file()
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "new link", "plain"]
    assert sorted(os.listdir(tmp_path / "disk")) == ["not yet", "real"]
    with pytest.raises(ArtifactError, match="already exists"), shards_job(tmp_path / "link", {}):
        pytest.fail("a full folder was taken")


def test_what_cannot_be_renamed_to_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounted").mkdir()
    (tmp_path / "link").symlink_to("mounted")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.setattr(os.path, "ismount", lambda path: os.path.basename(path) == "mounted")
    for name, words in (("mounted", "mount point"), ("link", "mount point"), ("circle", "circle")):
        with pytest.raises(ArtifactError, match=words) as refused, shards_job(tmp_path / name, {}):
            pytest.fail("work was begun")
        assert refused.value.hint
    assert sorted(os.listdir(tmp_path)) == ["circle", "link", "mounted"]
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="name a folder inside it"), shards_job("/", {}):
        pytest.fail("work was begun")


def test_what_did_nothing_leaves_nothing(tmp_path: Path) -> None:
    for command in ("first", "second"):
        with pytest.raises(RuntimeError, match=command), shards_job(tmp_path / "out", {"command": command}):
            raise RuntimeError(command)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_shard_of_another_attempt_does_not_stay(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    notes = tmp_path / ".out.partial/.job"
    notes.mkdir(parents=True)
    (notes / "job.json").write_text('{"command": "another"}')
    (notes / ".shard_0.json.x1y2").write_text("{")
    for name in ("00007.tar", ".00008.tar.part"):
        (notes.parent / name).write_bytes(b"half a shard")
    with shards_job(tmp_path / "out", {}) as job:
        job.run(Make(picture, None), 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "00000.tar",
        "00000.parquet",
        "00000_stats.json",
        "00000_index.parquet",
        "manifest.json",
    }


def test_only_one_process_makes_a_folder(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    with shards_job(tmp_path / "out", {}) as job:
        with pytest.raises(ArtifactError, match="another process"), shards_job(tmp_path / "out", {}):
            pytest.fail("a second one was let in")
        job.run(Make(picture, None), 1)
    assert (tmp_path / "out/00000.tar").is_file()


class Make:
    """Writes shards of two samples each; one number fails, as often as there is a reason to."""

    def __init__(self, picture: Callable[..., bytes], failure: Exception | None) -> None:
        self.image, self.failure = picture(1), failure

    def __call__(self, folder: Path, number: int, advance: Advance | None) -> dict[str, Any]:
        if number == 1 and self.failure:
            raise self.failure
        name = shard_name(number)
        samples = ({"image": self.image, "ext": "png", "caption": str(place)} for place in range(2))
        entries = (entry(sample_key(name, place, 2), sample) for place, sample in enumerate(samples))
        return {"rows": write_shard(entries, folder, name)}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_stops_the_run_and_leaves_what_is_done(
    jobs: int, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    out = tmp_path / "out"
    failure = OSError(28, "No space left on device", "00001.tar")
    with pytest.raises((OSError, DataError), match="No space left"), shards_job(out, {}) as job:
        job.run(Make(picture, failure), 3, jobs=jobs)
    assert not out.exists()
    assert (tmp_path / ".out.partial/00000.tar").is_file()
    with shards_job(out, {}) as job:
        assert job.run(Make(picture, None), 3, jobs=jobs) == [{"rows": 2}] * 3
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [2, 2, 2]
    assert not (out / ".job").exists()


def test_an_empty_folder_is_taken_and_a_full_one_is_not(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with shards_job(out, {}) as job:
        job.run(Make(picture, None), 1)
    with pytest.raises(ArtifactError, match="already exists"), shards_job(out, {}):
        pytest.fail("a full folder was taken")
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_for_people_comes_back_from_a_process(tmp_path: Path) -> None:
    def work(key: int) -> int:
        raise ConfigError(f"{key} is wrong", hint="give another")

    with pytest.raises(DataError, match=r"0 is wrong \(give another\)"):
        list(each(work, [0, 1, 2], 2))
    assert list(each(abs, [-1, 2, -3], 2)) == [1, 2, 3]


def test_the_number_of_processes_is_at_least_one() -> None:
    assert jobs_or_cores(3) == 3
    assert jobs_or_cores(None) >= 1
    with pytest.raises(ConfigError, match="jobs"):
        jobs_or_cores(0)
