"""What is known about the request in hand: its id and how long each stage took.

The outermost middleware begins a context; anything that runs for the request adds to it through a context
variable, and the middleware writes it out as `X-Request-ID` and `Server-Timing`.
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_SOUND_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestContext:
    """The id of one request and the seconds spent in its stages."""

    request_id: str
    began: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.began

    def server_timing(self) -> str:
        """The value of the `Server-Timing` header, in milliseconds."""
        parts = [f"{name};dur={seconds * 1000:.1f}" for name, seconds in self.stages.items()]
        return ", ".join([*parts, f"total;dur={self.seconds * 1000:.1f}"])


_CURRENT: ContextVar[RequestContext | None] = ContextVar("clipkit_request", default=None)


def begin(offered_id: str | None) -> RequestContext:
    """Start the context of a request; a client's id is kept when it is short and plain."""
    sound = offered_id is not None and _SOUND_ID.fullmatch(offered_id)
    context = RequestContext(offered_id if sound and offered_id else uuid.uuid4().hex)
    _CURRENT.set(context)
    return context


def request_id() -> str:
    """The id of the request in hand."""
    context = _CURRENT.get()
    return context.request_id if context else "-"


def spent(stage: str, seconds: float) -> None:
    """Add time to a stage of the request in hand."""
    context = _CURRENT.get()
    if context:
        context.stages[stage] = context.stages.get(stage, 0.0) + seconds


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Time a block as a stage of the request in hand."""
    start = time.perf_counter()
    try:
        yield
    finally:
        spent(stage, time.perf_counter() - start)
