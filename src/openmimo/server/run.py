"""A server on a socket."""

from __future__ import annotations

import logging
import sys

import uvicorn
from starlette.types import ASGIApp

from openmimo.server.guard import access_log
from openmimo.server.options import ServerOptions


def serve(app: ASGIApp, options: ServerOptions, *, log_requests: bool = False) -> None:
    """Listen until SIGINT or SIGTERM; then no more is taken, and what was begun gets `drain_seconds`."""
    if log_requests:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access_log.addHandler(handler)
        access_log.setLevel(logging.INFO)
        access_log.propagate = False
    make_server(app, options).run()


def make_server(app: ASGIApp, options: ServerOptions) -> uvicorn.Server:
    """The server, not yet listening."""
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,
        h11_max_incomplete_event_size=64 << 10,
        http="h11",
        ws="none",
    )
    return uvicorn.Server(config)
