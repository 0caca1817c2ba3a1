"""Copies of remote shards: whole or not there, downloaded once, within their limit, and of one version."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import ConfigError, DataError, NotFoundError
from clipkit_data.remote.cache import ShardFiles, default_folder
from clipkit_data.remote.storage import Retry
from tests.clipkit_data.flaky_server import Fault, FlakyServer, flaky_server

DATA = bytes(range(256)) * 1000


def no_pause(seconds: float) -> None:
    """Time is not what is tested."""


QUICK = Retry(sleep=no_pause, timeout=5)


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with flaky_server() as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> ShardFiles:
    return ShardFiles(tmp_path / "cache", retry=QUICK)


def again(files: ShardFiles) -> ShardFiles:
    """The same cache as another process sees it."""
    return pickle.loads(pickle.dumps(ShardFiles(files.folder, files.limit_bytes)))


def tars(files: ShardFiles) -> list[str]:
    return sorted(path.name for path in files.folder.iterdir() if not path.name.startswith(".room"))


def until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process that runs code with a cache module at hand."""
    begin = "import sys\nfrom clipkit_data.remote.cache import ShardFiles\n"
    command = [sys.executable, "-c", begin + code, *map(str, arguments)]
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> str:
    with process:
        return process.communicate(timeout=60)[0]


def test_a_shard_is_downloaded_once_and_then_found(server: FlakyServer, files: ShardFiles) -> None:
    url = server.put("data/train/00000.tar", DATA)
    copy = files.local(url, len(DATA))
    assert copy.read_bytes() == DATA
    assert copy.name.startswith("train-00000-")
    assert files.local(url) == again(files).local(url) == copy
    assert server.count("GET", "data/train/00000.tar") == 1
    with os.fdopen(files.open(url), "rb") as file:
        assert file.read() == DATA


def test_local_shards_stay_where_they_are(tmp_path: Path) -> None:
    files = ShardFiles(tmp_path / "cache")
    (tmp_path / "a.tar").write_bytes(DATA)
    assert files.local(str(tmp_path / "a.tar")) == files.local(tmp_path / "a.tar") == tmp_path / "a.tar"
    files.prefetch([tmp_path / "a.tar"])
    os.close(files.open(tmp_path / "a.tar"))
    assert not files.folder.exists()
    with pytest.raises(DataError, match=r"no\.tar: cannot be opened"):
        files.open(tmp_path / "no.tar")


def test_the_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path))
    assert ShardFiles().folder == default_folder() == tmp_path
    monkeypatch.delenv("CLIPKIT_CACHE")
    assert default_folder() == Path.home() / ".cache/clipkit/shards"


def test_shards_of_one_name_in_two_places_are_two(server: FlakyServer, files: ShardFiles) -> None:
    first, second = server.put("a/b/0.tar", b"one"), server.put("c/b/0.tar", b"two")
    assert files.local(first).read_bytes() == b"one"
    assert files.local(second).read_bytes() == b"two"
    assert files.local(f"{first}?signature=x").read_bytes() == b"one"
    assert "signature" not in "".join(path.read_text() for path in files.folder.glob("*.json"))


def test_over_every_fault_the_copy_has_the_same_bytes(server: FlakyServer, files: ShardFiles) -> None:
    url = server.put("a.tar", DATA)
    server.fail("a.tar", Fault(status=500), times=3, method="HEAD")
    for fault in (Fault(status=503), Fault(cut=70_000), Fault(claim=512), Fault(cut=0)):
        server.fail("a.tar", fault)
    assert files.local(url).read_bytes() == DATA


def test_what_never_comes_whole_is_never_there(server: FlakyServer, files: ShardFiles) -> None:
    url, server.ranges = server.put("a.tar", DATA), False
    for fault, said in (
        (Fault(cut=1000), "gave up after 5 tries"),
        (Fault(claim=1000), "gave up after 5 tries"),
        (Fault(extra=b"more"), "more than the 256000 bytes"),
        (Fault(status=403), "no access"),
    ):
        server.mend()
        server.fail("a.tar", fault, times=99)
        with pytest.raises(DataError, match=said):
            files.local(url)
        assert not [name for name in tars(files) if not name.endswith(".lock")]
    with pytest.raises(NotFoundError, match=r"no\.tar"):
        files.local(f"{server.url}/no.tar")
    server.mend()
    assert files.local(url).read_bytes() == DATA


def test_a_size_must_be_known_from_someone(server: FlakyServer, files: ShardFiles) -> None:
    url, server.lengths = server.put("a.tar", DATA), False
    with pytest.raises(DataError, match="does not say how many bytes"):
        files.local(url)
    assert files.local(url, len(DATA)).read_bytes() == DATA
    assert again(files).local(url, len(DATA)).read_bytes() == DATA


def test_a_shard_of_another_size_than_the_manifest_says_is_refused(
    server: FlakyServer, files: ShardFiles
) -> None:
    url = server.put("a.tar", DATA)
    with pytest.raises(DataError, match="has 256000 bytes, the manifest says 255999"):
        files.local(url, len(DATA) - 1)
    files.local(url, len(DATA))
    for known in (files, again(files)):
        with pytest.raises(DataError, match="it changed after it was indexed"):
            known.local(url, len(DATA) + 1)


def test_a_stale_copy_is_replaced_when_a_process_first_opens_it(
    server: FlakyServer, files: ShardFiles
) -> None:
    url = server.put("a.tar", DATA)
    files.local(url)
    server.put("a.tar", DATA[::-1])
    assert again(files).local(url, len(DATA)).read_bytes() == DATA[::-1]
    with pytest.raises(DataError, match=r"a\.tar: it changed while it was in use"):
        files.local(url)


def test_a_shard_that_changes_during_a_run_stops_it(server: FlakyServer, files: ShardFiles) -> None:
    url = server.put("a.tar", DATA)
    files.local(url).unlink()  # as another process may that needs room
    server.put("a.tar", DATA[::-1])
    with pytest.raises(DataError, match="it changed while it was in use"):
        files.local(url)


def test_a_shard_that_changes_while_it_is_copied_is_refused(server: FlakyServer, files: ShardFiles) -> None:
    url, gate = server.put("a.tar", DATA), threading.Event()
    server.fail("a.tar", Fault(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(files.local, url)
        until(lambda: server.count("GET", "a.tar") == 1)
        server.put("a.tar", DATA[::-1])
        gate.set()
        with pytest.raises(DataError, match="changed while it was copied"):
            copying.result()
    assert files.local(url).read_bytes() == DATA[::-1]


def test_a_damaged_copy_is_downloaded_again(server: FlakyServer, files: ShardFiles) -> None:
    url = server.put("a.tar", DATA)
    copy = files.local(url)
    copy.write_bytes(DATA[:1000])
    assert files.local(url).read_bytes() == DATA
    copy.with_name(f"{copy.name}.json").write_text("{")
    assert files.local(url).read_bytes() == DATA
    assert server.count("GET", "a.tar") == 3


def test_threads_that_want_one_shard_download_it_once(server: FlakyServer, files: ShardFiles) -> None:
    url = server.put("a.tar", DATA)
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(lambda _: files.local(url), range(16)))
    assert len(copies) == 1
    assert server.count("GET", "a.tar") == 1


def test_two_processes_that_want_one_shard_download_it_once(server: FlakyServer, files: ShardFiles) -> None:
    url, gate = server.put("a.tar", DATA), threading.Event()
    server.fail("a.tar", Fault(gate=gate))
    code = "print('go', flush=True); print(len(ShardFiles(sys.argv[1]).local(sys.argv[2]).read_bytes()))"
    both = [child(code, files.folder, url) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
    until(lambda: server.count("GET", "a.tar") == 1)
    gate.set()
    assert [output(process).split() for process in both] == [[str(len(DATA))]] * 2
    assert server.count("GET", "a.tar") == 1


def test_a_killed_download_leaves_nothing_that_passes_for_a_shard(
    server: FlakyServer, files: ShardFiles
) -> None:
    url, gate = server.put("a.tar", DATA), threading.Event()
    server.fail("a.tar", Fault(gate=gate))
    process = child("ShardFiles(sys.argv[1]).local(sys.argv[2])", files.folder, url)
    until(lambda: any(path.stat().st_size for path in files.folder.glob("*.part")))
    os.kill(process.pid, signal.SIGKILL)
    output(process)
    gate.set()
    assert list(files.folder.glob("*.part"))
    assert not list(files.folder.glob("*.tar"))
    assert files.local(url).read_bytes() == DATA
    assert not list(files.folder.glob("*.part"))


def test_what_a_killed_download_left_gives_way_to_another_shard(server: FlakyServer, tmp_path: Path) -> None:
    files = ShardFiles(tmp_path, len(DATA) + 10, retry=QUICK)
    (tmp_path / "b-0123.tar.part").write_bytes(DATA)
    assert files.local(server.put("a.tar", DATA)).read_bytes() == DATA
    assert not list(tmp_path.glob("*.part"))


FULL = """
import resource
from clipkit.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ShardFiles(sys.argv[1]).local(sys.argv[2])
except DataError as error:
    print(error)
"""


def test_a_full_disk_is_said_and_leaves_nothing(server: FlakyServer, files: ShardFiles) -> None:
    url = server.put("a.tar", DATA)
    said = output(child(FULL, files.folder, url))
    assert "the disk is full" in said
    assert "CLIPKIT_CACHE" in said
    assert not [name for name in tars(files) if not name.endswith(".lock")]


def test_a_folder_that_cannot_be_made_is_said(server: FlakyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"shard cache .*file/cache: no access"):
        ShardFiles(tmp_path / "file" / "cache").local(server.put("a.tar", DATA))


def test_the_copies_used_longest_ago_give_way(server: FlakyServer, tmp_path: Path) -> None:
    urls = [server.put(f"{number}.tar", DATA) for number in range(4)]
    files = ShardFiles(tmp_path, 3 * len(DATA), retry=QUICK)
    for place, url in enumerate(urls[:3]):
        note = files.local(url).with_suffix(".tar.json")
        os.utime(note, (place, place))
    files.local(urls[0])  # used again: 1 is now the oldest
    with os.fdopen(files.open(urls[1]), "rb") as held:
        os.utime(files.path(urls[1]).with_suffix(".tar.json"), (1, 1))
        files.local(urls[3])
        assert [files.path(url).exists() for url in urls] == [True, False, True, True]
        assert held.read() == DATA
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) == 3 * len(DATA)


def test_a_copy_at_work_is_not_removed(server: FlakyServer, tmp_path: Path) -> None:
    urls = [server.put(f"{number}.tar", DATA) for number in range(3)]
    files = ShardFiles(tmp_path, 2 * len(DATA), retry=QUICK)
    for place, url in enumerate(urls[:2]):
        os.utime(files.local(url).with_suffix(".tar.json"), (place, place))
    with ThreadPoolExecutor(1) as pool, FileLock(tmp_path / f".{files.path(urls[0]).name}.lock"):
        pool.submit(files.local, urls[2]).result()
    assert [files.path(url).exists() for url in urls] == [True, False, True]


def test_a_download_waits_for_the_room_that_another_one_holds(server: FlakyServer, tmp_path: Path) -> None:
    first, second, gate = server.put("1.tar", DATA), server.put("2.tar", DATA), threading.Event()
    files = ShardFiles(tmp_path, len(DATA) + 10, retry=QUICK)
    server.fail("1.tar", Fault(gate=gate))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(files.local, first)
        until(lambda: server.count("GET", "1.tar") == 1)
        two = pool.submit(files.open, second)
        until(lambda: server.count("HEAD", "2.tar") == 1)
        assert server.count("GET", "2.tar") == 0
        gate.set()
        one.result()
        with os.fdopen(two.result(), "rb") as file:
            assert file.read() == DATA
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_limits_that_cannot_be_kept_are_refused(server: FlakyServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        ShardFiles(tmp_path, 0)
    with pytest.raises(ConfigError, match="256000 bytes does not fit a shard cache of 1000"):
        ShardFiles(tmp_path, 1000).local(server.put("a.tar", DATA))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    wanted=st.lists(st.integers(0, 5), max_size=25),
    limit=st.integers(50, 150),
)
def test_within_a_limit_every_shard_is_right_and_the_latest_are_kept(
    sizes: list[int], wanted: list[int], limit: int
) -> None:
    memory, root = fsspec.filesystem("memory"), f"memory://{uuid4().hex}"
    for number, size in enumerate(sizes):
        memory.pipe_file(f"{root}/{number}.tar", bytes([number]) * size)
    recent: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        files = ShardFiles(folder, limit)
        for clock, number in enumerate(place % len(sizes) for place in wanted):
            copy = files.local(f"{root}/{number}.tar", sizes[number])
            os.utime(copy.with_suffix(".tar.json"), (clock, clock))
            assert copy.read_bytes() == bytes([number]) * sizes[number]
            if number not in recent:
                while sum(sizes[kept] for kept in recent) + sizes[number] > limit:
                    recent.pop(0)
            recent = [kept for kept in recent if kept != number] + [number]
            names = {path.name for path in Path(folder).glob("*.tar")}
            assert names == {files.path(f"{root}/{kept}.tar").name for kept in recent}


def test_shards_are_fetched_ahead(server: FlakyServer, files: ShardFiles) -> None:
    urls = [server.put(f"{number}.tar", DATA) for number in range(5)]
    files.prefetch(urls)
    files.prefetch(urls)
    until(lambda: len(list(files.folder.glob("*.tar.json"))) == 5)
    for url in urls:
        assert files.local(url).read_bytes() == DATA
    assert all(server.count("GET", f"{number}.tar") == 1 for number in range(5))


def test_fetching_ahead_neither_waits_nor_grows(server: FlakyServer, files: ShardFiles) -> None:
    gate, urls = threading.Event(), [server.put(f"{number}.tar", DATA) for number in range(60)]
    for number in range(60):
        server.fail(f"{number}.tar", Fault(gate=gate))
    files.prefetch(urls)  # returns, though nothing can be finished
    assert len([thread for thread in threading.enumerate() if thread.name == "clipkit-prefetch"]) >= 2
    gate.set()
    until(lambda: not files._own.asked)
    assert 2 <= len(list(files.folder.glob("*.tar"))) < 60


def test_what_goes_wrong_ahead_is_raised_where_the_shard_is_needed(
    server: FlakyServer, files: ShardFiles
) -> None:
    url = f"{server.url}/no.tar"
    files.prefetch([url])
    until(lambda: not files._own.asked and server.count("HEAD", "no.tar") > 0)
    with pytest.raises(NotFoundError, match=r"no\.tar"):
        files.local(url)
    server.put("no.tar", DATA)
    assert files.local(url).read_bytes() == DATA


def _read_in_child(files: ShardFiles, url: str, answers: "multiprocessing.Queue[int]") -> None:
    files.prefetch([url])
    answers.put(len(files.local(url).read_bytes()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_travels_to_other_processes(server: FlakyServer, files: ShardFiles, method: str) -> None:
    first, second = server.put("1.tar", DATA), server.put("2.tar", DATA[:77])
    files.prefetch([first])
    files.local(first)
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_read_in_child, args=(files, second, answers))
    process.start()
    assert answers.get(timeout=60) == 77
    process.join()
    answers.close()
    answers.join_thread()
    assert json.loads(files.path(second).with_suffix(".tar.json").read_text())["size"] == 77


def test_the_limit_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKIT_CACHE_BYTES", "12345")
    assert ShardFiles(tmp_path).limit_bytes == 12345
    assert ShardFiles(tmp_path, 99).limit_bytes == 99
    for wrong in ("many", "-1", "1.5", "0"):
        monkeypatch.setenv("CLIPKIT_CACHE_BYTES", wrong)
        with pytest.raises(ConfigError):
            ShardFiles(tmp_path)
