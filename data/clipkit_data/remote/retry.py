"""What to do when a remote file cannot be read: try again, or say at once what is wrong.

Faults are of two kinds. What may pass (a time-out, a lost connection, a 5xx answer, a body that ends early)
is tried again after a growing pause and, when it does not pass, stops the job: nothing is left out and no
order changes because of a network. What will not pass (nothing there, no access, a missing driver) is
reported at once. Drivers have errors of their own; they are told apart by what they have in common.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from clipkit.errors import ClipkitError, DataError, DependencyError, InputError, NotFoundError

log = logging.getLogger("clipkit_data")
T = TypeVar("T")
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*)://")
_HTTP = ("http", "https")
_WAITING = (408, 425, 429)  # the answers below 500 that ask to come again
_NO_ACCESS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


class AccessError(DataError):
    """A remote file that may not be read; some stores also answer so when there is none."""


def is_remote(spec: str | Path) -> bool:
    """Whether a path is an URL (`scheme://…`)."""
    return isinstance(spec, str) and _SCHEME.match(spec) is not None


def is_http(url: str) -> bool:
    """Whether an URL is read over HTTP, which has no folders."""
    return url.partition("://")[0].lower() in _HTTP


def shown(url: str) -> str:
    """URLs, and commands that name some, for messages: without user, password and what follows `?`."""
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", re.sub(r"(://)[^/@\s]*@", r"\1", url))


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and after which pauses something is tried again.

    Args:
        attempts: Tries in all.
        first, longest: Pause after the first try and the longest one, seconds; it doubles in between.
        timeout: Seconds without a byte after which an HTTP connection counts as lost.
        sleep: Waits.
    """

    attempts: int = 5
    first: float = 0.5
    longest: float = 8.0
    timeout: float = 60.0
    sleep: Callable[[float], Any] = time.sleep

    def call(self, action: Callable[[], T], url: str) -> T:
        """The result of `action`, tried again while its faults may pass.

        Raises:
            NotFoundError: Nothing is there.
            DataError: No access, another fault that will not pass, or too many that might have.
            DependencyError: The driver for this kind of URL is missing.
            InputError: It is no URL that can be read.
        """
        for attempt in count(1):
            try:
                return action()
            except ClipkitError:
                raise
            except Exception as error:
                lasting = _lasting(error, url)
                if lasting is not None:
                    raise lasting from error
                if attempt >= self.attempts:
                    raise DataError(
                        f"{shown(url)}: gave up after {attempt} tries: {words(error)}",
                        hint="the store or the way to it has a fault; start again when it has passed",
                    ) from error
                pause = min(self.first * 2 ** (attempt - 1), self.longest)
                log.warning("%s: %s; try %d follows in %g s", shown(url), words(error), attempt + 1, pause)
                self.sleep(pause)
        raise AssertionError("count() does not end")


def words(error: BaseException) -> str:
    """The first line of an error, with what some drivers leave to its class."""
    text = re.sub(r"(://)[^/@\s]*@", r"\1", str(error).strip().partition("\n")[0])
    text = re.sub(r"[?]\S*", "?…", text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error carries."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int | str) and str(value).isdigit():
            return int(value)
    return None


def _lasting(error: Exception, url: str) -> ClipkitError | None:
    """What to raise for a fault that will not pass; None for one that may. Raises: errors of programs."""
    cause: BaseException = error
    if is_http(url) and isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # fsspec calls every failed look at an HTTP file "not found"
    status, name = _status(cause), shown(url)
    if status in (404, 410) or isinstance(cause, FileNotFoundError):
        return NotFoundError(f"{name}: no such file on the server")
    if status in (401, 403) or isinstance(cause, PermissionError) or type(cause).__name__ in _NO_ACCESS:
        return AccessError(
            f"{name}: no access: {words(cause)}",
            hint="see to the credentials; some stores also say so of a file that is not there",
        )
    if isinstance(cause, ImportError):
        return _no_driver(url, cause)
    if status is not None and 400 <= status < 500 and status not in _WAITING:
        return DataError(f"{name}: the server answered {status}: {words(cause)}")
    if isinstance(cause, ValueError | IsADirectoryError | NotADirectoryError):
        return InputError(f"{name}: cannot be read: {words(cause)}")
    if not isinstance(cause, OSError | EOFError) and type(cause).__module__ == "builtins":
        raise error
    return None


def _no_driver(url: str, error: BaseException) -> DependencyError:
    """The error for a scheme whose package is missing, with the line that installs it."""
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0].lower()
    package = known_implementations.get(scheme, {}).get("class", "fsspec").partition(".")[0]
    if package == "fsspec":
        cause = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        package = getattr(cause, "name", None) or scheme
    return DependencyError(
        f"{shown(url)}: reading {scheme}:// needs a package: {words(error)}", hint=f"pip install {package}"
    )
