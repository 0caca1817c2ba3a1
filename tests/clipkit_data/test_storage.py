"""Remote files: the same bytes whatever the network does, or a clear stop."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import ArtifactError, DataError, DependencyError, InputError, NotFoundError
from clipkit_data.remote import storage
from clipkit_data.remote.storage import (
    RemoteFile,
    Retry,
    is_remote,
    list_shards,
    read_bytes,
    shown,
    stat,
)
from tests.clipkit_data.flaky_server import Fault, FlakyServer, flaky_server

DATA = bytes(range(256)) * 1000


@pytest.fixture
def server() -> Iterator[FlakyServer]:
    with flaky_server() as running:
        yield running


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def retry(pauses: list[float]) -> Retry:
    return Retry(sleep=pauses.append, timeout=5)


def whole(url: str, retry: Retry, size: int | None = len(DATA)) -> bytes:
    with RemoteFile(url, retry, size) as file:
        return b"".join(iter(lambda: file.read(50_000), b""))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_is_taken_up_where_it_broke(
    server: FlakyServer, retry: Retry, pauses: list[float], ranges: bool
) -> None:
    url, server.ranges, gate = server.put("a.tar", DATA), ranges, threading.Event()
    server.fail("a.tar", Fault(cut=100_000, gate=gate))
    with RemoteFile(url, retry, len(DATA)) as file:
        got = file.read(10_000) or b""
        gate.set()
        assert got + b"".join(iter(lambda: file.read(50_000), b"")) == DATA
    assert pauses == [0.5]
    spans = [span for method, _, span in server.requests if method == "GET"]
    assert spans[0] == ""
    assert int(spans[1].removeprefix("bytes=").removesuffix("-")) >= len(got) > 0


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, len(DATA)), max_size=4), ranges=st.booleans())
def test_the_bytes_are_the_same_wherever_connections_break(cuts: list[int], ranges: bool) -> None:
    with flaky_server() as server:
        url, server.ranges = server.put("a.tar", DATA), ranges
        for cut in cuts:
            server.fail("a.tar", Fault(cut=cut))
        assert whole(url, Retry(sleep=lambda _: None, timeout=5)) == DATA


def test_a_server_that_never_answers_well_stops_the_job_after_five_tries(
    server: FlakyServer, retry: Retry, pauses: list[float]
) -> None:
    url = server.put("a.tar", DATA)
    server.fail("a.tar", Fault(status=503), times=9)
    with pytest.raises(DataError, match=r"a\.tar: gave up after 5 tries: .*503"):
        whole(url, retry)
    assert pauses == [0.5, 1, 2, 4]
    assert server.count("GET", "a.tar") == 5


def test_errors_of_the_server_are_waited_out(server: FlakyServer, retry: Retry, pauses: list[float]) -> None:
    url = server.put("a.tar", DATA)
    for method in ("HEAD", "GET"):
        server.fail("a.tar", Fault(status=500), times=3, method=method)
    assert stat(url, retry).size == len(DATA)
    assert len(pauses) == 3
    server.fail("a.tar", Fault(status=429), times=2)
    assert read_bytes(url, retry) == DATA


def test_a_body_shorter_than_the_file_is_no_end(server: FlakyServer, retry: Retry) -> None:
    url = server.put("a.tar", DATA)
    server.fail("a.tar", Fault(claim=1000))
    assert whole(url, retry) == DATA
    server.fail("a.tar", Fault(claim=1000), times=50)
    server.ranges = False
    with pytest.raises(DataError, match=r"ended after 1000 of 256000 bytes|ended before byte 1000"):
        whole(url, retry)


def test_a_server_that_falls_silent_is_left_and_asked_again(server: FlakyServer, pauses: list[float]) -> None:
    url = server.put("a.tar", DATA)
    server.fail("a.tar", Fault(stall=3))
    assert whole(url, Retry(timeout=0.3, sleep=pauses.append)) == DATA
    assert pauses == [0.5]


def test_what_is_not_there_or_not_allowed_is_not_tried_again(
    server: FlakyServer, retry: Retry, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{server.url}/no.tar"
    with pytest.raises(NotFoundError, match=r"127.*/no\.tar"):
        stat(url, retry)
    with pytest.raises(NotFoundError, match=r"127.*/no\.tar"):
        whole(url, retry)
    assert read_bytes(url, retry) is None
    url = server.put("closed.tar", DATA)
    server.fail("closed.tar", Fault(status=403), times=3)
    with pytest.raises(DataError, match=r"closed\.tar: no access"):
        whole(url, retry)
    assert read_bytes(url, retry) is None
    assert "taken as not there" in caplog.text
    assert not pauses


def test_nobody_listening_is_a_fault_that_may_pass(retry: Retry, pauses: list[float]) -> None:
    with flaky_server() as gone:
        url = gone.url
    with pytest.raises(DataError, match="gave up after 5 tries"):
        stat(f"{url}/a.tar", retry)
    assert len(pauses) == 4


@given(
    fails=st.integers(0, 12),
    attempts=st.integers(1, 10),
    first=st.floats(0.1, 2),
    longest=st.floats(0.1, 20),
)
def test_pauses_double_up_to_the_longest_and_tries_are_counted(
    fails: int, attempts: int, first: float, longest: float
) -> None:
    pauses: list[float] = []
    left = iter(range(fails))

    def action() -> str:
        for _ in left:
            raise ConnectionResetError("reset")
        return "done"

    retry = Retry(attempts, first, longest, sleep=pauses.append)
    if fails < attempts:
        assert retry.call(action, "s3://b/k") == "done"
    else:
        with pytest.raises(DataError, match=f"gave up after {attempts} tries"):
            retry.call(action, "s3://b/k")
    assert len(pauses) == min(fails, attempts - 1)
    assert pauses == [min(first * 2**i, longest) for i in range(len(pauses))]


def test_a_bug_is_not_taken_for_a_fault_of_the_network(retry: Retry, pauses: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        retry.call(lambda: 1 // 0, "s3://b/k")
    assert not pauses


@pytest.mark.parametrize(("scheme", "package"), [("abfs", "adlfs"), ("sftp", "paramiko")])
def test_a_missing_driver_is_named_with_the_line_that_installs_it(
    scheme: str, package: str, retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=f"pip install {package}"):
        stat(f"{scheme}://somewhere/a.tar", retry)


def test_a_scheme_that_nobody_knows_is_refused(retry: Retry, pauses: list[float]) -> None:
    with pytest.raises(InputError, match="Protocol not known"):
        stat("nonsense://a/b.tar", retry)
    assert not pauses


def test_what_is_remote() -> None:
    assert is_remote("s3://bucket/a.tar")
    assert is_remote("HTTPS://host/a.tar")
    for local in ("a.tar", "/data/{0..9}.tar", "sample:emoji", "pipe:cat http://x", Path("s3://b/a.tar")):
        assert not is_remote(local)


def test_signatures_and_passwords_are_not_shown(server: FlakyServer, retry: Retry) -> None:
    assert shown("https://me:secret@host/a.tar?sig=secret") == "https://host/a.tar"
    for url in (f"{server.url}/no.tar?sig=secret", "http://me:secret@127.0.0.1:9/a.tar?sig=secret"):
        with pytest.raises((NotFoundError, DataError)) as caught:
            stat(url, retry)
        assert "secret" not in str(caught.value)


def test_a_folder_and_a_pattern_are_listed_by_name(retry: Retry) -> None:
    files, root = fsspec.filesystem("memory"), f"memory://{uuid4().hex}"
    for name in ("00001.tar", "00000.tar", "x.json", "deep/00002.tar"):
        files.pipe_file(f"{root}/{name}", b"data")
    assert list_shards(root, retry) == [f"{root}/00000.tar", f"{root}/00001.tar"]
    assert list_shards(f"{root}/", retry) == list_shards(root, retry)
    assert list_shards(f"{root}/*1.tar", retry) == [f"{root}/00001.tar"]
    assert list_shards(f"{root}/*/*.tar", retry) == [f"{root}/deep/00002.tar"]
    assert read_bytes(f"{root}/x.json", retry) == b"data"
    assert read_bytes(f"{root}/y.json", retry) is None
    for nothing in (f"{root}/no", f"{root}/no*.tar"):
        with pytest.raises(NotFoundError, match="no shards in memory://"):
            list_shards(nothing, retry)


def test_http_has_no_folders_but_a_manifest_names_the_shards(server: FlakyServer, retry: Retry) -> None:
    with pytest.raises(InputError, match=r"cannot list.*data/\{00000\.\.00099\}\.tar"):
        list_shards(f"{server.url}/data", retry)
    names = ["00001.tar", "00000.tar", "extra.tar"]
    manifest = {"format": 1, "shards": [{"name": name, "bytes": 1} for name in names]}
    server.put("data/manifest.json", json.dumps(manifest).encode())
    assert list_shards(f"{server.url}/data", retry) == [f"{server.url}/data/{name}" for name in sorted(names)]
    assert list_shards(f"{server.url}/data/0*.tar", retry) == [
        f"{server.url}/data/00000.tar",
        f"{server.url}/data/00001.tar",
    ]
    for wrong in (b"{", b"[]", b'{"shards": [{"name": "../a.tar"}]}', b'{"shards": [{}]}'):
        server.put("data/manifest.json", wrong)
        with pytest.raises(ArtifactError, match=r"data/manifest\.json: not a manifest"):
            list_shards(f"{server.url}/data", retry)


def test_small_local_files_are_read_by_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"data")
    assert read_bytes(tmp_path / "a") == read_bytes(str(tmp_path / "a")) == b"data"
    assert read_bytes(f"file://{tmp_path}/a") == b"data"
    assert read_bytes(tmp_path / "no") is None
    with pytest.raises(DataError, match="cannot be read"):
        read_bytes(tmp_path)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that speaks S3."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "Running on http" in line)
        endpoint = line.split("Running on ")[1].strip()
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("shards")
        yield "s3://shards"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_shards_in_s3(s3: str, retry: Retry, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    monkeypatch.setattr(storage, "PIECE", 60_000)  # several requests for one file
    files = fsspec.filesystem("s3")
    for name in ("00001.tar", "00000.tar", "notes.txt"):
        files.pipe_file(f"{s3}/data/{name}", DATA + name.encode())
    assert list_shards(f"{s3}/data", retry) == [f"{s3}/data/00000.tar", f"{s3}/data/00001.tar"]
    url = f"{s3}/data/00001.tar"
    before = stat(url, retry)
    assert before.size == len(DATA) + 9
    assert before.tag
    with io.BufferedReader(RemoteFile(url, retry, before.size), 1 << 20) as file:
        assert file.read() == DATA + b"00001.tar"
    files.pipe_file(url, DATA[::-1] + b"00001.tar")
    assert stat(url, retry) != before
    assert read_bytes(f"{s3}/data/manifest.json", retry) is None
    with pytest.raises(NotFoundError):
        stat(f"{s3}/data/00007.tar", retry)
    with pytest.raises(NotFoundError):
        list_shards(f"{s3}/empty", retry)
    assert not pauses


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:pw@h/a.tar?sig=1", "https://h/a.tar"),
        ("stream:https://h/{0..2}.tar?sig=1", "stream:https://h/{0..2}.tar"),
        ("pipe:curl https://u:p@h/a?b=1 | cat - http://g/c?d", "pipe:curl https://h/a | cat - http://g/c"),
        ("s3://bucket/what?.tar", "s3://bucket/what?.tar"),
        ("data/@home?/x.tar", "data/@home?/x.tar"),
    ],
)
def test_secrets_are_not_shown(url: str, words: str) -> None:
    assert shown(url) == words
