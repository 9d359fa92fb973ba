"""A server on a socket."""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from openmimo.server.guard import access_log
from openmimo.server.options import ServerOptions

LOG_LINES = 10_000  # that may wait to be written
LOG_SECONDS = 2.0  # for those that wait at the end
# A request's head has to be there within this time, or the connection is closed.
HEAD_SECONDS = 10.0


def serve(app: ASGIApp, options: ServerOptions, *, log_requests: bool = False) -> None:
    """Listen until SIGINT or SIGTERM; then no more is taken, and what was begun gets `drain_seconds`."""
    handler, listener = _patient_log()
    logging.getLogger().addHandler(handler)
    if log_requests:
        access_log.setLevel(logging.INFO)
    listener.start()
    try:
        make_server(app, options).run()
    finally:
        logging.getLogger().removeHandler(handler)
        # The last lines, but not at the price of never ending.
        end = threading.Thread(target=listener.stop, daemon=True)
        end.start()
        end.join(LOG_SECONDS)


def _patient_log() -> tuple[logging.Handler, QueueListener]:
    """Lines go to standard error from a thread of their own: whoever does not read them must not hold up requests."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(LOG_LINES)
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(logging.Formatter("%(message)s"))
    return _DroppingHandler(lines), _PatientListener(lines, output)


class _PatientListener(QueueListener):
    """Waits for room where the last line of all finds the queue full."""

    def __init__(self, lines: queue.Queue[Any], output: logging.Handler) -> None:
        super().__init__(lines, output)
        self._lines = lines

    def enqueue_sentinel(self) -> None:
        self._lines.put(None)


class _DroppingHandler(QueueHandler):
    """Leaves lines out where too many wait."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


def make_server(app: ASGIApp, options: ServerOptions) -> uvicorn.Server:
    """The server, not yet listening."""
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(options.drain_seconds) + 5,
        h11_max_incomplete_event_size=64 << 10,
        http=ImpatientProtocol,
        ws="none",
    )
    return uvicorn.Server(config)


class ImpatientProtocol(H11Protocol):
    """uvicorn's, but a client that drips the head of a request, or sends none, does not keep its connection."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(waiting=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch(waiting=self.conn.their_state is h11.IDLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch(waiting=False)
        super().connection_lost(exc)

    def _watch(self, *, waiting: bool) -> None:
        if waiting and self._head_timer is None:
            self._head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._give_up)
        elif not waiting and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
