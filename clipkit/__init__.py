"""clipkit: contrastive encoders from shards to search.

The public names are loaded when they are first used, so that `import clipkit` and `clipkit --help` cost
neither torch nor faiss.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipkit.errors import ClipkitError

if TYPE_CHECKING:
    from clipkit.embedder import Embedder
    from clipkit.index import Index
    from clipkit.models import load_model
    from clipkit.zero_shot import ZeroShotClassifier

__version__ = "0.1.0"
__all__ = ["ClipkitError", "Embedder", "Index", "ZeroShotClassifier", "load_model"]

_HOMES = {
    "Embedder": "clipkit.embedder",
    "Index": "clipkit.index",
    "ZeroShotClassifier": "clipkit.zero_shot",
    "load_model": "clipkit.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
