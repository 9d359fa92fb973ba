"""A server on a socket."""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from typing import Any, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from openmimo.server.guard import access_log
from openmimo.server.options import ServerOptions

LOG_LINES = 10_000  # that may wait to be written
LOG_SECONDS = 2.0  # for those that wait at the end
# A request's head has to be there within this time, or the connection is closed.
HEAD_SECONDS = 10.0
MOST_HEAD_BYTES = 64 << 10


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
        http=ImpatientProtocol,
        ws="none",
    )
    return uvicorn.Server(config)


class _Gathered:
    """A transport that writes once for all that is written between two turns of the event loop.

    uvicorn writes the head of an answer and its body one after the other. Each writing costs a call of the system and
    wakes the client, which takes processors from the engine where both share them.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not data:
            return
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's, but the head of a request has to be short, whole in time, and name a host."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._in_head = True  # a connection is made to send one
        self._num_heads = self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _Gathered(transport)))
        self._watch()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        heads = self._num_heads
        self._feed(data)
        # A head that is not whole yet is with the parser. Where another ended in `data`, most of that is its body.
        if self._in_head and heads == self._num_heads:
            self._num_head_bytes += len(data)
        if self._num_head_bytes > MOST_HEAD_BYTES:
            self._give_up(b"431 Request Header Fields Too Large")
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_head = False
        self._watch()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head, self._num_head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Raises: ValueError, which the parser makes an answer of status 400."""
        self._in_head, self._num_head_bytes = False, 0
        self._num_heads += 1
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MOST_HEAD_BYTES:
            raise ValueError("the head is too large")
        assert self.parser is not None
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() != "1.0"):
            raise ValueError("one Host header is expected")
        super().on_headers_complete()

    def _should_upgrade(self) -> bool:
        return True  # to `_feed`, which uvicorn leaves the request to then

    def _feed(self, data: bytes) -> None:
        assert self.parser is not None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as wish:
            self._pass_over_wish(data[wish.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _pass_over_wish(self, rest: bytes) -> None:
        """Read a request that asks for another protocol once more without that: the parser would leave out its body."""
        assert self.parser is not None
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("This server is no proxy.")
            return
        headers = b"".join(name + b": " + value + b"\r\n" for name, value in self.headers if name != b"upgrade")
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self._feed(method + b" " + self.url + b" HTTP/" + version + b"\r\n" + headers + b"\r\n" + rest)

    def _watch(self) -> None:
        if self._in_head and self._head_timer is None:
            late = b"408 Request Timeout"
            self._head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._give_up, late)
        elif not self._in_head and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self, status: bytes) -> None:
        if self._in_head and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
