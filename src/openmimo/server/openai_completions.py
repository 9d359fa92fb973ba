"""`/v1/completions`: texts or token ids in, texts out; what lm-eval's `local-completions` asks for among the rest."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from openmimo.engine import Completion, StreamEvent
from openmimo.server.errors import bad_request
from openmimo.server.extras import extras_of
from openmimo.server.http import Event, EventStream, JsonAnswer, read_model, unless_gone
from openmimo.server.reading import token_events
from openmimo.server.sampling import SamplingFields, TokenId, sampling_params
from openmimo.server.service import Service, new_id
from openmimo.server.usage import statistics_of, usage_of
from openmimo.server.worker import Ticket
from openmimo.text import Tokenizer

OBJECT = "text_completion"
MAX_PROMPTS = 1024
DEFAULT_TOKENS = 16  # OpenAI's


class CompletionBody(SamplingFields):
    """The request."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0)
    best_of: int | None = Field(default=None, ge=1)
    suffix: str | None = None


async def complete(service: Service, request: Request) -> Response:
    """Continue every prompt."""
    body = await read_model(request, CompletionBody)
    model = service.check_model(body.model)
    _check(service, body)
    prompts = await unless_gone(request, _prompts(service, body))
    tickets: list[Ticket] = []
    try:
        for prompt in prompts:
            params = sampling_params(
                body,
                service.options,
                room=service.room(len(prompt)),
                # The engine writes one token at least; it is left out where none was asked for.
                max_tokens=DEFAULT_TOKENS if body.max_tokens is None else max(1, body.max_tokens),
                logprobs=body.logprobs,
                prompt_logprobs=bool(body.echo) and body.logprobs is not None,
            )
            heads = service.check_heads(body.draft_heads)
            ticket = service.worker.submit(prompt, params, draft_heads=heads, wants_steps=bool(body.stream))
            tickets.append(ticket)
        answer = _CompletionAnswer(service, body, tickets, model)
        if body.stream:
            return EventStream(
                answer.events(),
                keep_alive_seconds=service.options.keep_alive_seconds,
                on_error=lambda error: [(None, error.body())],
            )
        for ticket in tickets:
            await unless_gone(request, service.worker.completions(ticket))
    except BaseException:
        for ticket in tickets:
            service.worker.cancel(ticket)
        raise
    return JsonAnswer(answer.whole())


def _check(service: Service, body: CompletionBody) -> None:
    if body.suffix:
        raise bad_request("suffix is not implemented; leave it out", param="suffix", code="unsupported_parameter")
    if body.best_of not in (None, body.n or 1):
        raise bad_request(
            f"best_of is {body.best_of}; only as many answers are written as are given back (n={body.n or 1})",
            param="best_of",
            code="unsupported_parameter",
        )
    if body.logprobs is not None and body.logprobs > service.options.max_logprobs:
        raise bad_request(
            f"logprobs is {body.logprobs}; at most {service.options.max_logprobs} are given", param="logprobs"
        )
    if body.stream and body.echo:
        raise bad_request("echo cannot be streamed; leave one of them out", param="echo", code="unsupported_parameter")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0; ask for one token at least, or for echo", param="max_tokens")


async def _prompts(service: Service, body: CompletionBody) -> list[list[int]]:
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]  # pyright: ignore[reportAssignmentType] one prompt
    many = list[str | list[int]](given)  # pyright: ignore[reportArgumentType] texts or lists of ids
    if not many or len(many) > MAX_PROMPTS:
        raise bad_request(f"prompt has {len(many)} entries; give 1 to {MAX_PROMPTS}", param="prompt")
    prompts: list[list[int]] = []
    for each in many:
        ids = await service.encode(each) if isinstance(each, str) else each
        prompts.append(service.check_ids(ids))
    return prompts


class _CompletionAnswer:
    """Writes the answers to all prompts of one request, whole or as a stream."""

    def __init__(self, service: Service, body: CompletionBody, tickets: list[Ticket], model: str) -> None:
        self.service, self.body, self.tickets = service, body, tickets
        self.head = {"id": new_id("cmpl-"), "object": OBJECT, "created": int(time.time()), "model": model}

    def whole(self) -> dict[str, Any]:
        """OpenAI's `text_completion`; a prompt's choices follow each other."""
        choices: list[dict[str, Any]] = []
        for ticket in self.tickets:
            answers = sorted(ticket.completions, key=lambda each: each.choice)
            for completion in answers:
                choices.append(self._choice(len(choices), ticket, completion, answers[0]))
        return {
            **self.head,
            "choices": choices,
            "usage": usage_of(self.service, self.tickets),
            **statistics_of(self.tickets),
        }

    def _choice(self, index: int, ticket: Ticket, completion: Completion, first: Completion) -> dict[str, Any]:
        decode, echo, written = self.service.tokenizer.decode, bool(self.body.echo), self.body.max_tokens != 0
        prompt = decode(ticket.prompt) if echo else ""
        logprobs = None
        if self.body.logprobs is not None:
            # The first token has nothing before it that could tell how probable it is.
            values: list[float | None] = [None, *(first.prompt_logprobs or ())] if echo else []
            best: list[Mapping[int, float] | None] = [None, *(first.prompt_top_logprobs or ())] if echo else []
            ids = list(ticket.prompt) if echo else []
            if echo and not self.body.logprobs:
                best = [None] * len(ids)
            if written:
                ids += completion.token_ids
                values += completion.logprobs or ()
                best += completion.top_logprobs or ({},) * len(completion.token_ids)
            logprobs = _logprobs(self.service.tokenizer, ids, values, best)
        return {
            "index": index,
            "text": prompt + (completion.text if written else ""),
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            **extras_of(completion, self.body),
        }

    async def events(self) -> AsyncIterator[Event]:
        """OpenAI's chunks, those of all prompts as they come."""
        firsts = [sum(ticket.num_choices for ticket in self.tickets[:place]) for place in range(len(self.tickets))]
        offsets = [[0] * ticket.num_choices for ticket in self.tickets]
        async for place, events in self._steps():
            for event in events:
                yield self._chunk(event, firsts[place], offsets[place])
        if self.body.wants_usage:
            usage = usage_of(self.service, self.tickets)
            yield None, {**self.head, "choices": [], "usage": usage, **statistics_of(self.tickets)}
        yield None, "[DONE]"

    async def _steps(self) -> AsyncIterator[tuple[int, list[StreamEvent]]]:
        """What the tickets' steps gave, each with the ticket's place."""
        worker = self.service.worker
        if len(self.tickets) == 1:
            async for events in worker.steps(self.tickets[0]):
                yield 0, events
            return
        merged: asyncio.Queue[tuple[int, list[StreamEvent]] | BaseException | None] = asyncio.Queue()

        async def follow(place: int) -> None:
            try:
                async for events in worker.steps(self.tickets[place]):
                    merged.put_nowait((place, events))
            except Exception as error:
                merged.put_nowait(error)
            else:
                merged.put_nowait(None)

        tasks = [asyncio.ensure_future(follow(place)) for place in range(len(self.tickets))]
        try:
            for _ in tasks:
                while (found := await merged.get()) is not None:
                    if isinstance(found, BaseException):
                        raise found
                    yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _chunk(self, event: StreamEvent, first: int, offsets: list[int]) -> Event:
        tokenizer, completion = self.service.tokenizer, event.completion
        choice: dict[str, Any] = {
            "index": first + event.choice,
            "text": event.text,
            "logprobs": None,
            "finish_reason": None if completion is None else completion.finish_reason,
        }
        if event.logprobs is not None:
            best = event.top_logprobs or ({},) * len(event.token_ids)
            choice["logprobs"] = _logprobs(tokenizer, event.token_ids, event.logprobs, best, offsets[event.choice])
            offsets[event.choice] += len(tokenizer.decode(event.token_ids))
        if self.body.token_events:
            choice["token_events"] = token_events(event, tokenizer)
        if self.body.return_token_ids:
            choice["token_ids"] = list(event.token_ids)
        if completion is not None:
            choice |= extras_of(completion, self.body)
        return None, {**self.head, "choices": [choice], **({"usage": None} if self.body.wants_usage else {})}


def _logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    values: Sequence[float | None],
    best: Sequence[Mapping[int, float] | None],
    offset: int = 0,
) -> dict[str, Any]:
    """The older format: a list per field. Tokens that are parts of characters have one text; the best of them stays."""
    tokens = [tokenizer.decode([token]) for token in ids]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    tops: list[dict[str, float] | None] = []
    for token, value, candidates in zip(ids, values, best, strict=True):
        if candidates is None or value is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for other, logprob in candidates.items():
            top.setdefault(tokenizer.decode([other]), logprob)
        top.setdefault(tokenizer.decode([token]), _finite(value))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [None if value is None else _finite(value) for value in values],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no minus infinity."""
    return logprob if math.isfinite(logprob) else -9999.0
