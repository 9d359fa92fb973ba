"""Requests in, answers out: bodies read with limits, JSON checked, streams of events, clients that go away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from openmimo.config.strict_json import parse_json_object
from openmimo.errors import MimoError, TextError, nearest
from openmimo.server.errors import ApiError, bad_request

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

# Problems of a body that are spelled out.
MOST_PROBLEMS = 3
UNION_MEMBERS = ("str", "int", "float", "bool", "list", "dict")
# A client that takes nothing for this long has gone.
SEND_SECONDS = 30.0


class GoneError(Exception):
    """The client has closed the connection."""


async def read_model(request: Request, model: type[M]) -> M:
    """The request's JSON body as `model`. Raises: ApiError 400 that names what is wrong."""
    try:
        content = parse_json_object(await request.body(), what="the body", error=TextError)
    except TextError as error:
        raise bad_request(str(error).replace("download or write it again", "send one JSON object in UTF-8")) from error
    return checked(content, model)


def checked(content: dict[str, Any], model: type[M]) -> M:
    """`content` as `model`. Raises: ApiError 400 that names what is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error, model) from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error


def _refusal(error: ValidationError, model: type[BaseModel]) -> ApiError:
    problems: list[str] = []
    first: str | None = None
    for problem in error.errors(include_url=False, include_context=False, include_input=False)[:MOST_PROBLEMS]:
        # Names of union members say nothing to a client.
        place = ".".join(str(part) for part in problem["loc"] if not _is_internal(part))
        first = first or place
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
            hint = nearest(place, [field.alias or name for name, field in model.model_fields.items()])
            problems.append(f"{place!r} is not a parameter that this server knows; {hint}")
        else:
            problems.append(f"{place or 'body'}: {problem['msg']}")
    return bad_request("; ".join(problems)[:1000], param=first, code="invalid_parameter")


def _is_internal(part: object) -> bool:
    return isinstance(part, str) and (part in UNION_MEMBERS or any(mark in part for mark in ("[", "(", "-")))


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for `work`, and cancel it if the client closes the connection. Raises: GoneError then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
                await asyncio.wait((future,))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def dumps(value: object) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


class JsonAnswer(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return dumps(content).encode()


Event = tuple[str | None, object]
"""The name of a server-sent event, if it has one, and its data: text, or what becomes JSON."""


class EventStream(Response):
    """Server-sent events. Errors that come up on the way become the last event, made by `on_error`.

    While nothing comes, a comment every `keep_alive_seconds` keeps proxies from closing the connection. The generator
    is closed as soon as the client goes.
    """

    def __init__(
        self,
        events: AsyncIterator[Event],
        *,
        keep_alive_seconds: float,
        on_error: Callable[[ApiError], list[Event]],
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"
        del self.headers["Content-Length"]
        self._events, self._keep_alive, self._on_error = events, keep_alive_seconds, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        line = _Line(send, self._keep_alive)
        tasks = [asyncio.ensure_future(work) for work in (self._send_all(line), _wait_for_end(receive), line.watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except OSError:
            pass  # the connection broke, or nothing was read (TimeoutError is one too)
        finally:
            for task in tasks:
                if not task.done():
                    task.cancel()
                    await asyncio.wait((task,))

    async def _send_all(self, line: _Line) -> None:
        await line.send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = aiter(self._events)
        try:
            async for event in events:
                await line.send_text(_encoded(event))
        except MimoError as error:
            refusal = error if isinstance(error, ApiError) else bad_request(str(error))
            await line.send_text("".join(_encoded(event) for event in self._on_error(refusal)))
        finally:
            close = getattr(events, "aclose", None)
            if close is not None:
                await close()
        await line.send({"type": "http.response.body", "body": b"", "more_body": False})


class _Line:
    """A stream's way to its client. One task watches it, which costs less than a timer for every piece."""

    def __init__(self, send: Send, keep_alive_seconds: float) -> None:
        self._send, self._keep_alive = send, keep_alive_seconds
        self._num_sending = 0
        self._moved_at = time.monotonic()

    async def send(self, message: Message) -> None:
        self._num_sending += 1
        self._moved_at = time.monotonic()
        try:
            await self._send(message)
        finally:
            self._num_sending -= 1
            self._moved_at = time.monotonic()

    async def send_text(self, text: str) -> None:
        await self.send({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def watch(self) -> None:
        """Send a comment where nothing else was sent for a while.

        Raises: TimeoutError when the client does not read; without the rest of the body the connection is closed.
        """
        while True:
            rest = self._moved_at + (SEND_SECONDS if self._num_sending else self._keep_alive) - time.monotonic()
            if rest > 0:
                await asyncio.sleep(min(rest, self._keep_alive))
            elif self._num_sending:
                raise TimeoutError("the client does not read")
            else:
                await asyncio.wait_for(self.send_text(": still working\n\n"), SEND_SECONDS)


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _encoded(event: Event) -> str:
    name, data = event
    text = data if isinstance(data, str) else dumps(data)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
