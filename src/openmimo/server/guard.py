"""What stands before every route: names, keys, limits of the body, an id and a log line for each request."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openmimo.server.errors import ApiError
from openmimo.server.http import JsonAnswer
from openmimo.server.metrics import ServerMetrics
from openmimo.server.options import LOCAL_NAMES, ServerOptions

access_log = logging.getLogger("openmimo.server.access")
_log = logging.getLogger(__name__)

OPEN_ROUTES = ("/health",)
WRITING_ROUTES = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
# A body of this size is read although it is not wanted, so that the connection can go on.
SKIPPED_BYTES = 64 << 10
ADMIN_PREFIX = "/admin"
ANTHROPIC_PREFIX = "/v1/messages"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


class Guard:
    """An ASGI application around the routes. Whatever happens inside, the client gets an answer in the right shape."""

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        metrics: ServerMetrics,
        *,
        refusal: Callable[[], ApiError | None] = lambda: None,
    ) -> None:
        """`refusal` says why no more answers can be written now, if so: then those who want one need not be read."""
        self.app, self.options, self.metrics, self.refusal = app, options, metrics, refusal
        self._names = {*LOCAL_NAMES, *options.allowed_hosts, options.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        visit = _Visit(scope, given if _REQUEST_ID.match(given) else secrets.token_hex(8), send)
        try:
            self._check(scope["path"], headers)
            body = _LimitedBody(receive, headers, self.options)
            if scope["path"] in WRITING_ROUTES and (refusal := self.refusal()) is not None:
                await body.skip()
                raise refusal
            await self.app(scope, body.receive, visit.send)
        except ApiError as error:
            await visit.refuse(error, receive)
        except Exception:
            _log.exception("request %s failed", visit.request_id)
            await visit.refuse(ApiError(500, "something went wrong here; the server's log has more"), receive)
        finally:
            if visit.status >= 400:
                self.metrics.refused.labels(str(visit.status)).inc()
            visit.log()

    def _check(self, path: str, headers: dict[str, str]) -> None:
        """Raises: ApiError for a wrong name, a missing or wrong key, or a body that is announced as too large."""
        options = self.options
        if not options.api_key:
            # A page of another site can make a browser call this server under that site's name.
            for name in ("host", "origin"):
                if not self._is_ours(headers.get(name, "")):
                    raise ApiError(403, f"the {name} {headers[name][:100]!r} is not one of this server's names")
        if path not in OPEN_ROUTES:
            wanted = options.admin_key if path.startswith(ADMIN_PREFIX) else options.api_key
            if path.startswith(ADMIN_PREFIX) and not wanted:
                raise ApiError(404, "there are no admin routes without an admin key")
            if wanted and not any(hmac.compare_digest(key.encode(), wanted.encode()) for key in _keys(headers)):
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                    code="invalid_api_key",
                )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > options.max_body_bytes:
            raise _too_large(options)

    def _is_ours(self, value: str) -> bool:
        """Whether a Host or Origin header, if there is one, names this server."""
        if not value:
            return True
        try:
            name = urlsplit(value if "://" in value else f"//{value}").hostname
        except ValueError:
            return False
        return name in self._names


class _LimitedBody:
    """The body as it arrives, neither larger nor slower than allowed."""

    def __init__(self, receive: Receive, headers: dict[str, str], options: ServerOptions) -> None:
        self._receive, self._options = receive, options
        self._num_bytes, self._complete = 0, False
        self._end = time.monotonic() + options.body_seconds

    async def skip(self) -> None:
        """Read a short body to its end and forget it. Raises: ApiError as `receive` does."""
        while not self._complete and self._num_bytes <= SKIPPED_BYTES:
            if (await self.receive())["type"] != "http.request":
                return

    async def receive(self) -> Message:
        """Raises: ApiError 413 and 408."""
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._end - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self._options.body_seconds:.0f} s") from error
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._num_bytes > self._options.max_body_bytes:
                raise _too_large(self._options)
        return message


class _Visit:
    """One request: what was answered, and how long it took."""

    def __init__(self, scope: Scope, request_id: str, send: Send) -> None:
        self.scope, self.request_id, self._send = scope, request_id, send
        self.status = self.num_bytes = 0
        self.began = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
        elif message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        await self._send(message)

    async def refuse(self, error: ApiError, receive: Receive) -> None:
        """The error as the answer, if none was begun."""
        if self.status == 0:
            await refusal_answer(error, self.scope["path"])(self.scope, receive, self.send)

    def log(self) -> None:
        """A line of JSON."""
        if access_log.isEnabledFor(logging.INFO):
            client = self.scope.get("client") or ("", 0)
            line = {
                "request_id": self.request_id,
                "method": self.scope["method"],
                "path": self.scope["path"][:200],
                "status": self.status,
                "bytes": self.num_bytes,
                "ms": round(1e3 * (time.monotonic() - self.began), 1),
                "client": client[0],
            }
            access_log.info(json.dumps(line))


def refusal_answer(error: ApiError, path: str) -> JsonAnswer:
    """The answer that says why not, as the path's clients read it."""
    # The rest of a refused body is not read, so the connection cannot be used again.
    close = {"Connection": "close"} if error.status in (408, 413) else {}
    body = error.body(anthropic=path.startswith(ANTHROPIC_PREFIX))
    return JsonAnswer(body, status_code=error.status, headers=error.headers | close)


def _keys(headers: dict[str, str]) -> list[str]:
    """The keys that a request offers. A browser, asked for a password, sends it as Basic authentication."""
    found = [headers["x-api-key"]] if "x-api-key" in headers else []
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        found.append(value.strip())
    elif kind.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            found.append(base64.b64decode(value, validate=True).decode().partition(":")[2])
    return found


def _too_large(options: ServerOptions) -> ApiError:
    return ApiError(413, f"the body is larger than {options.max_body_bytes} bytes; send less", code="body_too_large")
