"""A real HTTP server on this machine whose answers can be made to fail, and that remembers what was asked."""

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Args:
        status: Answer this and nothing else.
        cut: Close the connection after so many bytes of the body.
        claim: Name this length, and send no more than that.
        extra: Send these bytes more, and count them in the length.
        stall: Seconds to wait after half of the body.
        gate: Wait after half of the body until this is set.
    """

    status: int = 0
    cut: int | None = None
    claim: int | None = None
    extra: bytes = b""
    stall: float = 0.0
    gate: threading.Event | None = None


class FlakyServer:
    """What the server holds, what goes wrong with the next answers, and what was asked."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.lengths = True
        self.tags = True
        self.requests: list[tuple[str, str, str]] = []
        self._faults: dict[tuple[str, str], list[Fault]] = defaultdict(list)

    def put(self, path: str, data: bytes) -> str:
        """Hold a file; its URL."""
        self.files[path] = data
        return f"{self.url}/{path}"

    def fail(self, path: str, fault: Fault, *, times: int = 1, method: str = "GET") -> None:
        """Let the next answers for a path go wrong."""
        self._faults[method, path].extend([fault] * times)

    def mend(self) -> None:
        """Let nothing go wrong any more, and forget what was asked."""
        self._faults.clear()
        self.requests.clear()

    def next_fault(self, method: str, path: str) -> Fault:
        """What goes wrong now."""
        waiting = self._faults[method, path]
        return waiting.pop(0) if waiting else Fault()

    def count(self, method: str, path: str) -> int:
        """How often a path was asked for."""
        return sum(asked[:2] == (method, path) for asked in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: FlakyServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        held, path, span = self.held, self.path.partition("?")[0].lstrip("/"), self.headers.get("Range", "")
        held.requests.append((self.command, path, span))
        fault, data = held.next_fault(self.command, path), held.files.get(path)
        if fault.status or data is None:
            self.send_response(fault.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if span and held.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, total = int(first), len(data)
            data = data[start : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        else:
            self.send_response(200)
        data += fault.extra
        length = len(data) if fault.claim is None else fault.claim
        if held.tags:
            self.send_header("ETag", f'"{hashlib.sha256(held.files[path]).hexdigest()}"')
        if held.lengths:
            self.send_header("Content-Length", str(length))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if body:
            self._send(data[:length], fault)
        self.close_connection = self.close_connection or fault != Fault() or not held.lengths

    def _send(self, data: bytes, fault: Fault) -> None:
        data = data if fault.cut is None else data[: fault.cut]
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        time.sleep(fault.stall)
        if fault.gate is not None:
            fault.gate.wait(60)
        self.wfile.write(data[len(data) // 2 :])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


@contextmanager
def flaky_server() -> Iterator[FlakyServer]:
    """A server for the time of the block, on a free port."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        handler.held = FlakyServer(server.server_address[1])  # pyright: ignore[reportAttributeAccessIssue]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield handler.held  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            server.shutdown()
            thread.join()
