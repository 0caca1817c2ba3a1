"""clipkit_service: a model and an index behind a REST API and a page.

`create_app(settings)` makes the ASGI application; `clipkit serve` runs it. Importing this package costs
neither torch nor fastapi.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit_service.app import create_app
    from clipkit_service.settings import Settings

__all__ = ["Settings", "create_app"]

_HOMES = {"Settings": "clipkit_service.settings", "create_app": "clipkit_service.app"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit_service' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
