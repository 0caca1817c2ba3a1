"""The gate: what every request passes before and after the routes, in one plain ASGI middleware.

Before: Host, API key and declared size are checked while the body is still on the wire. During: the body's
bytes are counted, the deadline runs, and work stops when the client hangs up. After: id, timings and
security headers are added, and the request is counted. Nothing inside can end a request without an answer:
what no handler foresaw becomes an opaque 500 here.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Callable
from contextlib import suppress

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipkit_service import context
from clipkit_service.metrics import Metrics
from clipkit_service.problems import Problem, internal, respond
from clipkit_service.settings import Settings

log = logging.getLogger("clipkit.service")
access = logging.getLogger("clipkit.access")

PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_KEYED = ("/v1/", "/metrics")
_OWN_DEADLINE = ("/healthz", "/readyz", "/metrics")  # operators ask these of a server that hangs


class Gate:
    """See the module. `settings` gives the limits, `metrics` counts."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._hosts = settings.hosts
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request = context.begin(headers.get("x-request-id"))
        answer = _Answer(send, request)
        try:
            refusal = self._refusal(scope, headers)
            if refusal:
                await respond(refusal, scope["path"])(scope, receive, answer)
            else:
                await self._pass(scope, receive, answer)
        except Exception:
            log.exception("request %s: unforeseen error", request.request_id)
            if not answer.status:
                await respond(internal(), scope["path"])(scope, receive, answer)
        finally:
            self._count(scope, request, answer.status)

    def _refusal(self, scope: Scope, headers: Headers) -> Problem | None:
        """Why a request is turned away before its body is read, if it is."""
        host = headers.get("host", "")
        if self._hosts and _host_name(host) not in self._hosts:
            return Problem(
                400, "host_not_allowed", "this Host is not served here: set CLIPKIT_ALLOWED_HOSTS to allow it"
            )
        if self._key and scope["path"].startswith(_KEYED) and not self._knows_key(headers):
            return Problem(
                401,
                "unauthorized",
                "an API key is needed: send Authorization: Bearer KEY or X-API-Key: KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            return self._too_long()
        return None

    def _knows_key(self, headers: Headers) -> bool:
        assert self._key
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Headers arrive as latin-1; encoding them back gives the bytes that were sent.
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return secrets.compare_digest(given.encode("latin-1"), self._key)

    def _too_long(self) -> Problem:
        limit = self.settings.max_body_bytes
        self.metrics.rejected.labels("body_too_large").inc()
        return Problem(
            413,
            "body_too_large",
            f"the body has more than {limit} bytes",
            headers={"Connection": "close"},
            limit=limit,
        )

    async def _pass(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Let the app answer, within the deadline and while the client is there."""
        body = _Body(receive, self.settings.max_body_bytes, self._too_long)
        seconds = math.inf if scope["path"] in _OWN_DEADLINE else self.settings.deadline_s
        with anyio.CancelScope(deadline=anyio.current_time() + seconds) as work:
            watcher = asyncio.create_task(body.watch(lambda: None if answer.status else work.cancel()))
            try:
                await self.app(scope, body.receive, answer)
            finally:
                watcher.cancel()
                with suppress(asyncio.CancelledError):
                    await watcher
        if work.cancelled_caught and not answer.status and not body.gone:
            self.metrics.rejected.labels("deadline").inc()
            detail = f"the answer took longer than {self.settings.deadline_s:g} s"
            await respond(Problem(504, "deadline_exceeded", detail), scope["path"])(scope, receive, answer)

    def _count(self, scope: Scope, request: context.RequestContext, status: int) -> None:
        route = _template(scope)
        # 499: the client was gone before there was an answer.
        self.metrics.requests.labels(route, scope["method"], status or 499).inc()
        self.metrics.request_seconds.labels(route).observe(request.seconds)
        for stage, seconds in request.stages.items():
            self.metrics.stage_seconds.labels(stage).observe(seconds)
        access.info(
            "%s %s %d %.0f ms %s", scope["method"], route, status, request.seconds * 1000, request.request_id
        )


class _Body:
    """The request's body as it arrives: counted, and watched for the client's leaving."""

    def __init__(self, receive: Receive, limit: int, too_long: Callable[[], Problem]) -> None:
        self._receive = receive
        self._limit = limit
        self._too_long = too_long
        self._size = 0
        self._complete = asyncio.Event()
        self.gone = False

    async def receive(self) -> Message:
        """The next message. Raises: Problem 413 past the limit."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
        else:
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                raise self._too_long()
            if not message.get("more_body", False):
                self._complete.set()
        return message

    async def watch(self, on_gone: Callable[[], None]) -> None:
        """Once the body is complete, wait for the client to hang up."""
        await self._complete.wait()
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            on_gone()


class _Answer:
    """The answer as it leaves: its status, and the headers that every answer has."""

    def __init__(self, send: Send, request: context.RequestContext) -> None:
        self._send = send
        self._request = request
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._request.request_id
            headers["Server-Timing"] = self._request.server_timing()
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            headers.setdefault("Content-Security-Policy", PAGE_POLICY)
            headers.setdefault("Cache-Control", "no-cache" if "etag" in headers else "no-store")
        await self._send(message)


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _template(scope: Scope) -> str:
    """The route's template: few values, whatever clients ask for."""
    route = scope.get("route")
    if route is not None:
        return route.path
    return scope.get("root_path") or "unmatched"
