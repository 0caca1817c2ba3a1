"""uvicorn, with what clipkit wants of it: a claimed socket, one line when ready, a graceful end."""

import socket
import sys

import uvicorn
from fastapi import FastAPI

from clipkit_service.engine import Artifacts
from clipkit_service.settings import Settings


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, announcement: str) -> None:
        super().__init__(config)
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stderr.write(self._announcement + "\n")
            sys.stderr.flush()


def announcement(settings: Settings, claimed: socket.socket, artifacts: Artifacts) -> str:
    """The line that says that the service is ready, and for whom."""
    port = claimed.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    found = artifacts.index
    index = "no index" if found is None else f"index {settings.index}, {len(found)} pictures"
    line = f"clipkit: serving on http://{host}:{port} (model {settings.model}, {index})"
    if settings.on_loopback or settings.api_key:
        return line
    return (
        f"clipkit: WARNING: {settings.host} can be reached from other machines and no API key is set: "
        f"anyone there can search this index. Set CLIPKIT_API_KEY, or put a proxy in front.\n{line}"
    )


def serve_app(app: FastAPI, settings: Settings, claimed: socket.socket, artifacts: Artifacts) -> None:
    """Serve until SIGINT or SIGTERM; requests in hand get ten seconds to end."""
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=10,
        backlog=2048,
    )
    server = _Server(config, announcement(settings, claimed, artifacts))
    try:
        server.run(sockets=[claimed])
    except KeyboardInterrupt:
        sys.stderr.write("clipkit: stopped\n")
