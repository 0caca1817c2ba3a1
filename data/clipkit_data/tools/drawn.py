"""Samples that do not ship: drawn into the user's cache when they are first asked for.

They are cheap to draw and follow from their code alone, so shipping them would only make a download larger.
"""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from filelock import FileLock

from clipkit.errors import ArtifactError

MAKERS = {
    "moving": ("clipkit_data.tools.moving", "write_moving_shards", 1),
    "families": ("clipkit_data.tools.graphs", "write_families", 1),
    "digits": ("clipkit_data.tools.digits", "write_digit_shards", 1),
}
"""By name: the module and the function that writes the sample, and the version of what it writes.

Raise the version when anything changes the samples: a cache may hold the old ones.
"""


def drawn_sample(name: str) -> Path:
    """The folder of a sample in the user's cache, drawn now if it never was; `$XDG_CACHE_HOME` is respected.

    Args:
        name: A key of `MAKERS`.

    Raises:
        DependencyError: An extra that draws it is missing.
    """
    module, function, version = MAKERS[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipkit" / "samples"
    folder = cache / f"{name}-{version}"
    if not folder.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{cache}: cannot be made: {error.strerror}", hint="name another folder in XDG_CACHE_HOME"
            ) from error
        with FileLock(f"{folder}.lock"):  # another process may be drawing it
            if not folder.is_dir():
                write: Callable[[Path], object] = getattr(import_module(module), function)
                write(folder)
    return folder
