"""`clipkit serve`: claim the address, load, serve until told to stop.

The port is claimed before anything is loaded, so that a taken one is an error at once and nobody can take
it meanwhile; what is wrong with the model or the index is one line, before anything is served.
"""

import argparse
import errno
import logging
import socket
import sys
from pathlib import Path

from clipkit.cli import Command
from clipkit.errors import ConfigError, NotFoundError, PortInUseError


def claim_address(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: PortInUseError; ConfigError when there is no such address here."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"no such host: {host}", hint="for example --host 127.0.0.1") from error
    claimed = socket.socket(family, kind, protocol)
    try:
        # Lets a restart take the port over; two listeners are still refused, since this one listens at once.
        claimed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claimed.bind(address)
        claimed.listen(2048)
    except OSError as error:
        claimed.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"port {port} on {host} is in use", hint="stop what uses it, or choose another with --port"
            ) from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return claimed


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="MODEL", help="model folder, open_clip:… or hf:… name")
    parser.add_argument("--index", metavar="INDEX", type=Path, help="index folder; without one, no search")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument("--device", help="cpu, cuda, mps … (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help='"info" logs every request'
    )


def _run(args: argparse.Namespace) -> int:
    from clipkit_service.settings import load_settings

    settings = load_settings(
        model=args.model,
        index=args.index,
        host=args.host,
        port=args.port,
        device=args.device,
        log_level=args.log_level,
    )
    if settings.index is not None and not settings.index.is_dir():
        raise NotFoundError(f"no such folder: {settings.index}", hint="make it with clipkit index build")
    claimed = claim_address(settings.host, settings.port)
    with claimed:
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        from clipkit_service.app import create_app
        from clipkit_service.engine import load_artifacts
        from clipkit_service.server import serve_app

        artifacts = load_artifacts(settings)
        serve_app(create_app(settings, artifacts), settings, claimed, artifacts)
    return 0


serve = Command(
    help="serve search, classification and embeddings over HTTP, with a page",
    examples=(
        "  clipkit serve --model demo/model --index demo/index\n"
        "  clipkit serve --model open_clip:ViT-B-32/laion2b_s34b_b79k --port 8080\n"
        "  CLIPKIT_API_KEY=secret clipkit serve --model demo/model --host 0.0.0.0\n"
        "Every setting can be given as an environment variable CLIPKIT_…, for example CLIPKIT_MAX_K=100."
    ),
    arguments=_arguments,
    run=_run,
)
