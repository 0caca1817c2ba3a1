"""`clipkit serve` as a process on a real port: it starts, says so, answers, ends; or a line says why not."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from clipkit.cli import main
from clipkit_service.commands import claim_address
from clipkit_service.engine import Artifacts
from clipkit_service.server import announcement

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "clipkit", "serve", *map(str, arguments)]


class Serving:
    """A running server and what it has written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr
        written = iter(process.stderr.readline, "")
        self._reader = threading.Thread(target=lambda: self.lines.extend(written))
        self._reader.start()

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no line has {pattern!r}: {self.lines}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(20)
        self._reader.join()
        return code


@contextmanager
def serving(where: Path, *arguments: object, **environment: str) -> Iterator[Serving]:
    with subprocess.Popen(
        command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=where,
        env=ENVIRONMENT | environment,
    ) as process:
        server = Serving(process)
        try:
            yield server
        finally:
            if process.poll() is None:
                server.end(signal.SIGKILL)


def test_serves_until_told_to_stop(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", world.model, "--index", world.shop, "--port", 0, "--log-level", "info")
    with serving(tmp_path, *arguments) as server:
        url = server.wait_for(
            r"clipkit: serving on (http://127\.0\.0\.1:\d+) \(model .*tiny.* 12 pictures\)"
        )[1]
        with httpx.Client(base_url=url, timeout=20) as client:
            assert client.get("/readyz").status_code == 200
            found = client.get("/v1/search", params={"q": "a secret wish", "k": 3}).json()["data"]
            assert len(found) == 3
            assert client.get(found[0]["image_url"]).headers["content-type"] == "image/webp"
            assert client.get("/").status_code == 200
            assert "server" not in client.get("/healthz").headers

        port = url.rpartition(":")[2]
        assert main(["serve", "--model", str(world.model), "--port", port]) == 1
        assert capsys.readouterr().err == (
            f"clipkit: error: port {port} on 127.0.0.1 is in use "
            "(stop what uses it, or choose another with --port)\n"
        )
        assert server.end() in (0, -signal.SIGTERM)
        log = "".join(server.lines)
        assert "GET /v1/search 200" in log
        assert "secret" not in log
        assert "Traceback" not in log


def test_hang_up_stops_the_work(world: Any, tmp_path: Path) -> None:
    """A client that goes away takes its thousands of prompts with it."""
    asked = {
        "image": base64.b64encode(world.pictures[0]).decode(),
        "labels": [f"label {i} of a client in a hurry" for i in range(1000)],
        "templates": [f"{i} words around {{}}" for i in range(8)],
    }
    body = json.dumps(asked).encode()
    with serving(tmp_path, "--model", world.model, "--port", 0, CLIPKIT_MAX_BATCH="1") as server:
        url = httpx.URL(server.wait_for(r"serving on (http://\S+)")[1])
        head = f"POST /v1/classify HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((url.host, url.port or 80)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            with httpx.Client(base_url=url, timeout=20) as client:
                wait_until(lambda: depth(client) > 0)
                connection.close()
                wait_until(lambda: depth(client) == 0, 5)
                assert 'status="499"' in client.get("/metrics").text
                assert client.post("/v1/embeddings", json={"input": "cat"}).status_code == 200


def depth(client: httpx.Client) -> int:
    return client.get("/readyz").json()["queues"]["text"]["depth"]


def wait_until(true: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_wide_open_service_warns(world: Any) -> None:
    artifacts = Artifacts(world.encoder, "tiny", None, "default", 0)
    with claim_address("127.0.0.1", 0) as claimed:
        port = claimed.getsockname()[1]
        for given, warned in (
            ({"host": "0.0.0.0"}, True),
            ({"host": "::"}, True),
            ({"host": "0.0.0.0", "api_key": "key"}, False),
            ({"host": "127.0.0.1"}, False),
            ({"host": "::1"}, False),
        ):
            said = announcement(world.settings(index=None, **given), claimed, artifacts)
            assert ("WARNING" in said) == warned, said
            host = f"[{given['host']}]" if ":" in given["host"] else given["host"]
            assert said.splitlines()[-1].startswith(f"clipkit: serving on http://{host}:{port} (model ")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--model", "{other}", "--index", "{index}"), 1, "was made with tiny"),
        (("--model", "{tmp}/none"), 2, "none"),
        (("--model", "{model}", "--index", "{tmp}/none"), 2, "none"),
        (("--model", "{model}", "--index", "{tmp}"), 1, ""),
        ((), 2, "no model was named"),
        (("--model", "{model}", "--port", "70000"), 2, "port"),
        (("--model", "{model}", "--host", "no.such.host.invalid"), 2, "no such host"),
        (("--model", "{model}", "--host", "203.0.113.1"), 2, "cannot listen on 203.0.113.1"),
    ],
)
def test_what_is_wrong_is_one_line(
    world: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    names = {"model": world.model, "other": world.other_model, "index": world.shop, "tmp": tmp_path}
    given = [argument.format(**names) for argument in arguments]
    port = [] if "--port" in given else ["--port", "0"]
    assert main(["serve", *given, *port]) == code
    said = capsys.readouterr().err
    assert said.startswith("clipkit: error: ")
    assert said.count("\n") == 1
    assert words in said
