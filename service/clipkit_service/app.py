"""`create_app`: settings in, an ASGI application out.

The model and the index are loaded when the application starts (its lifespan), checked against each other,
and warmed up by the same test that `/readyz` makes; nothing is shared between two applications.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from clipkit import __version__
from clipkit_service import problems
from clipkit_service.docs import STYLE, docs_page
from clipkit_service.engine import Artifacts, Engine, load_artifacts
from clipkit_service.metrics import Metrics
from clipkit_service.middleware import Gate
from clipkit_service.routes import ROUTERS
from clipkit_service.schemas import ClassifyRequest
from clipkit_service.settings import Settings

log = logging.getLogger("clipkit.service")

STATIC = Path(__file__).parent / "static"
DESCRIPTION = (
    "Search pictures with words or pictures, classify them with labels nobody trained, and embed both into "
    "one space. Pictures are sent as bytes, never as addresses. Every refusal is `application/problem+json`."
)


def create_app(settings: Settings, artifacts: Artifacts | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        settings: What to serve and within which limits.
        artifacts: The model and the index when they are loaded already; else the lifespan loads them.

    Returns:
        An application that answers once its lifespan has begun. Its start raises NotFoundError,
        ArtifactError or MismatchError when model or index cannot be served.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = artifacts or await anyio.to_thread.run_sync(load_artifacts, settings)
        engine = Engine(loaded, settings, metrics)
        engine.start()
        try:
            for fault in await engine.faults():  # also the warm-up
                log.error("not ready: %s", fault)
            app.state.engine = engine
            yield
        finally:
            app.state.engine = None
            await engine.close()

    app = FastAPI(
        title="clipkit",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        form_limits={"max_files": 4 * settings.max_images, "max_fields": 64, "max_part_size": 1 << 20},
    )
    app.state.metrics = metrics
    problems.install(app)
    for router in ROUTERS:
        app.include_router(router)
    _mount_page(app)
    if settings.docs:
        _mount_docs(app, settings)
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Server-Timing", "Retry-After"],
        )
    app.openapi = lambda: _openapi(app, settings)
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _mount_page(app: FastAPI) -> None:
    """The page at `/` and its files below `/static`."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False), name="static")


def _mount_docs(app: FastAPI, settings: Settings) -> None:
    """The API's description at `/docs`."""

    @app.get("/docs", include_in_schema=False)
    async def page(request: Request) -> Response:
        base = str(request.base_url).rstrip("/")
        return HTMLResponse(docs_page(app.openapi(), base, with_key=settings.api_key is not None))

    @app.get("/docs/style.css", include_in_schema=False)
    async def style() -> Response:
        return Response(STYLE, media_type="text/css", headers={"Cache-Control": "no-cache"})


def _openapi(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The OpenAPI document, with an id in its examples that the index has."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    # The route reads its body by itself, JSON or form, so FastAPI does not know the schema.
    own = ClassifyRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= own.pop("$defs", {})
    schemas["ClassifyRequest"] = own
    if settings.api_key:
        bearer = {"type": "http", "scheme": "bearer"}
        document["components"]["securitySchemes"] = {"key": bearer}
        document["security"] = [{"key": []}]
    engine: Engine | None = getattr(app.state, "engine", None)
    if engine is None:
        return document
    if engine.index is not None and len(engine.index):
        _use_id(document, int(engine.index.ids[0]))
    app.openapi_schema = document
    return document


def _use_id(document: dict[str, Any], known: int) -> None:
    """Put an id that the index has in place of the examples' 0."""
    searching = document["paths"]["/v1/search"]["post"]["requestBody"]["content"]["application/json"]
    examples = {name: dict(example) for name, example in searching["examples"].items()}
    examples["id"]["value"] = {**examples["id"]["value"], "query": {"id": known}}
    searching["examples"] = examples
    for path in ("/v1/indexes/{name}/items/{id}", "/v1/indexes/{name}/items/{id}/image"):
        for parameter in document["paths"][path]["get"]["parameters"]:
            if parameter["name"] == "id":
                parameter["examples"] = {"an item": {"value": known}}
