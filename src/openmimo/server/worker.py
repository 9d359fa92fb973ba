"""One thread that owns the engine, and the event loop's side of it.

The loop hands over commands; the thread carries them out between two steps, and after every step gives all that the
step yielded back to the loop at once. Nothing else touches the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from openmimo.engine import Completion, Engine, EngineLoad, SamplingParams, StreamEvent
from openmimo.errors import MimoError
from openmimo.server.errors import ApiError

T = TypeVar("T")
Command = Callable[[], None]
_log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are no numbers after this text: its weights are damaged, or the text overflows them"
# Steps that fail one after the other before the server says that it is not well.
MOST_FAILURES = 3


@dataclass(eq=False)
class Ticket:
    """A request in the worker. Times are those of `time.monotonic`, 0 before they are known."""

    prompt: Sequence[int]
    params: SamplingParams
    draft_heads: int | str | None
    wants_steps: bool
    submitted_at: float
    request_id: int = -1
    first_token_at: float = 0.0
    finished_at: float = 0.0
    completions: list[Completion] = field(default_factory=list[Completion])
    # The loop's side.
    events: deque[StreamEvent] = field(default_factory=deque[StreamEvent])
    num_unread: int = 0
    error: ApiError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def num_choices(self) -> int:
        return self.params.n

    @property
    def is_open(self) -> bool:
        """Whether more will come from the engine."""
        return self.error is None and len(self.completions) < self.num_choices


class EngineWorker:
    """Runs an engine for an event loop. `on_close(ticket)` is called in the loop once for every ticket that ends.

    `max_open` answers may be written or wait at the same time.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_open: int,
        buffer_tokens: int,
        on_close: Callable[[Ticket], None] | None = None,
    ) -> None:
        self.engine = engine
        self.max_open = max_open
        self.buffer_tokens = buffer_tokens
        self.draining = False  # no new requests
        self.closing = False
        self.num_open = 0
        self.num_failures = 0
        self.load: EngineLoad = engine.load
        self._on_close = on_close or (lambda ticket: None)
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # the thread's, by request
        self._open: set[Ticket] = set()  # the loop's
        self._views: dict[int | str | None, Engine] = {None: engine}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work for the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self, drain_seconds: float) -> None:
        """Take no more requests, give those there are some time, end the rest, and stop the thread."""
        self.draining = self.closing = True
        end = time.monotonic() + drain_seconds
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for ticket in tuple(self._open):
            self._end(ticket, ApiError(503, "the server stops; send the request again elsewhere or later"))
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    @property
    def open_tickets(self) -> tuple[Ticket, ...]:
        """The requests that are written or wait."""
        return tuple(self._open)

    @property
    def is_well(self) -> bool:
        """Whether the thread lives and its last steps did not all fail."""
        return self._thread.is_alive() and self.num_failures < MOST_FAILURES

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        draft_heads: int | str | None = None,
        wants_steps: bool,
    ) -> Ticket:
        """Hand a request over; with `wants_steps` its tokens come step by step, else only the answers.

        Raises: ApiError 503 while the server ends, 429 where too many answers are open.
        """
        refusal = self.refusal(params.n)
        if refusal is not None:
            raise refusal
        ticket = Ticket(prompt, params, draft_heads, wants_steps, time.monotonic())
        self.num_open += params.n
        self._open.add(ticket)
        self._commands.put(lambda: self._add(ticket))
        return ticket

    def refusal(self, num_answers: int = 1) -> ApiError | None:
        """Why so many more answers cannot be taken now, if they cannot."""
        if self.draining:
            return ApiError(503, "the server is stopping; send the request again elsewhere or later", code="draining")
        if self.num_open + num_answers > self.max_open:
            return ApiError(
                429,
                f"{self.num_open} answers are written or waiting, and {self.max_open} is the most; try again later",
                code="queue_full",
                retry_after=1,
            )
        return None

    async def steps(self, ticket: Ticket) -> AsyncIterator[list[StreamEvent]]:
        """What the ticket's steps gave, as it comes; leaving early cancels the request. Raises: ApiError."""
        try:
            while ticket.is_open or ticket.events:
                if not ticket.events:
                    ticket.changed.clear()
                    await ticket.changed.wait()
                events = list(ticket.events)
                ticket.events.clear()
                ticket.num_unread = 0
                if events:
                    yield events
            if ticket.error is not None:
                raise ticket.error
        finally:
            self.cancel(ticket)

    async def completions(self, ticket: Ticket) -> list[Completion]:
        """The answers in the order of the choices, once all are finished. Raises: ApiError."""
        try:
            while ticket.is_open:
                ticket.changed.clear()
                await ticket.changed.wait()
            if ticket.error is not None:
                raise ticket.error
        finally:
            self.cancel(ticket)
        return sorted(ticket.completions, key=lambda completion: completion.choice)

    def cancel(self, ticket: Ticket) -> None:
        """End a request that nobody wants any more; one that has ended is let be."""
        if ticket in self._open:
            self._end(ticket, ApiError(499, "the client has gone", code="cancelled"))

    async def call(self, function: Callable[[], T]) -> T:
        """Run something in the engine's thread, between two steps."""
        assert self._loop is not None
        loop, result = self._loop, self._loop.create_future()

        def run() -> None:
            try:
                value = function()
            except Exception as error:
                loop.call_soon_threadsafe(_set, result, None, error)
            else:
                loop.call_soon_threadsafe(_set, result, value, None)

        self._commands.put(run)
        return await result

    # What follows until `_run` happens in the loop.

    def _end(self, ticket: Ticket, error: ApiError) -> None:
        ticket.error = error
        self._commands.put(lambda: self._drop(ticket))
        self._closed(ticket)
        ticket.changed.set()

    def _closed(self, ticket: Ticket) -> None:
        if ticket in self._open:
            self._open.remove(ticket)
            self.num_open -= ticket.num_choices
            self._on_close(ticket)

    def _deliver(self, batch: list[tuple[Ticket, StreamEvent]], load: EngineLoad) -> None:
        self.load = load
        self.num_failures = 0
        for ticket, event in batch:
            if ticket.error is not None:
                continue
            if event.completion is not None:
                if event.completion.finish_reason == "error":
                    self._end(ticket, ApiError(500, NOT_FINITE, code="not_finite"))
                    continue
                ticket.completions.append(event.completion)
            if ticket.wants_steps:
                ticket.events.append(event)
                ticket.num_unread += len(event.token_ids)
            if not ticket.is_open:
                self._closed(ticket)
            elif ticket.num_unread > self.buffer_tokens:
                self._end(ticket, ApiError(503, f"{self.buffer_tokens} tokens were not read in time", code="slow"))
            ticket.changed.set()

    def _note_load(self, load: EngineLoad) -> None:
        self.load = load

    def _refuse(self, tickets: list[Ticket], error: ApiError, *, failed: bool) -> None:
        self.num_failures += failed
        for ticket in tickets:
            if ticket.error is None:
                ticket.error = error
                self._closed(ticket)
                ticket.changed.set()

    # What follows happens in the thread.

    def _run(self) -> None:
        assert self._loop is not None
        while True:
            # Without work, wait for a command; with work, take those that are there.
            while not self.engine.has_work or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command()
            try:
                events = self.engine.step()
            except Exception:
                self._recover()
                continue
            self._hand_out(events)

    def _hand_out(self, events: list[StreamEvent]) -> None:
        assert self._loop is not None
        now = time.monotonic()
        batch: list[tuple[Ticket, StreamEvent]] = []
        for event in events:
            ticket = self._tickets.get(event.request_id)
            if ticket is None:
                continue
            ticket.first_token_at = ticket.first_token_at or now
            if event.completion is not None:
                ticket.finished_at = now
            if ticket.wants_steps or event.completion is not None:
                batch.append((ticket, event))
        if batch:
            self._loop.call_soon_threadsafe(self._deliver, batch, self.engine.load)
        for ticket in {ticket for ticket, event in batch if event.completion is not None}:
            if not self.engine.is_open(ticket.request_id):
                del self._tickets[ticket.request_id]

    def _add(self, ticket: Ticket) -> None:
        assert self._loop is not None
        if ticket.error is not None:
            return  # cancelled while it waited here
        try:
            view = self._views.get(ticket.draft_heads)
            if view is None:
                assert ticket.draft_heads is not None
                view = self._views[ticket.draft_heads] = self.engine.with_drafts(ticket.draft_heads)
            ticket.request_id = view.add_request(ticket.prompt, ticket.params)
        except MimoError as error:
            refusal = ApiError(400, str(error))
            self._loop.call_soon_threadsafe(lambda: self._refuse([ticket], refusal, failed=False))
        else:
            self._tickets[ticket.request_id] = ticket

    def _drop(self, ticket: Ticket) -> None:
        assert self._loop is not None
        if self._tickets.pop(ticket.request_id, None) is not None:
            self.engine.abort(ticket.request_id)
            self._loop.call_soon_threadsafe(self._note_load, self.engine.load)

    def _recover(self) -> None:
        """A step failed: its requests are told, and everything that they held is freed."""
        assert self._loop is not None
        _log.exception("a step failed; all requests in progress end with an error")
        tickets = list(self._tickets.values())
        for ticket in tickets:
            self._drop(ticket)
        error = ApiError(500, "the engine failed; the request can be sent again", code="engine_failed")
        self._loop.call_soon_threadsafe(lambda: self._refuse(tickets, error, failed=True))


def _set(future: asyncio.Future[T], value: T, error: Exception | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
