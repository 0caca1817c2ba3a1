"""The exceptions that clipkit raises for people.

Every one is a `ClipkitError` whose message says what was wrong and where, and whose optional hint says
what to do. The command line prints them as one line and exits with `exit_code`; the service maps them to a
status. `assert` is kept for invariants of the code itself.

    ClipkitError
    ├── ConfigError          a recipe, option or setting is wrong
    ├── InputError           an argument, text, label or vector is wrong
    │   └── ImageError       a picture cannot be used (`reason` says why)
    ├── NotFoundError        a name or path that does not exist
    ├── DataError            a shard, sample or table is damaged
    ├── ArtifactError        a model, embeddings, index or run folder is damaged or of another kind
    │   └── MismatchError    two artifacts do not belong together
    ├── DependencyError      an optional package is missing
    └── PortInUseError       the address to serve on is taken
"""

from typing import Literal

ImageFault = Literal["empty", "format", "too_large", "undecodable"]


class ClipkitError(Exception):
    """Base of every error meant for people."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(ClipkitError):
    """A recipe, option or setting is wrong."""

    exit_code = 2


class InputError(ClipkitError):
    """An argument, text, label or vector is wrong."""

    exit_code = 2


class ImageError(InputError):
    """A picture cannot be used; `reason` is one of `ImageFault`."""

    def __init__(self, message: str, reason: ImageFault, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.reason: ImageFault = reason


class NotFoundError(ClipkitError):
    """A name or path does not exist."""

    exit_code = 2


class DataError(ClipkitError):
    """A shard, sample or table is damaged."""


class ArtifactError(ClipkitError):
    """A model, embeddings, index or run folder is damaged or of another kind."""


class MismatchError(ArtifactError):
    """Two artifacts do not belong together."""


class DependencyError(ClipkitError):
    """An optional package is missing."""


class PortInUseError(ClipkitError):
    """The address to serve on is taken."""
