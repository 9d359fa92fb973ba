"""`/v1/messages` and `/v1/messages/count_tokens`, as Anthropic's clients speak."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from openmimo.engine import Completion
from openmimo.errors import TextError
from openmimo.server.errors import bad_request
from openmimo.server.formats import constraint_of
from openmimo.server.http import Event, EventStream, JsonAnswer, read_model, unless_gone
from openmimo.server.reading import ChoiceReader
from openmimo.server.sampling import Body, SamplingFields, sampling_params, stop_texts
from openmimo.server.service import Service, new_id
from openmimo.server.tools import CallDemand, call_demand, checked_tools
from openmimo.server.usage import statistics_of
from openmimo.server.worker import Ticket
from openmimo.text import (
    ArgumentsDelta,
    ContentDelta,
    Message,
    ReasoningDelta,
    ResponseEvent,
    ToolCall,
    ToolCallEvent,
    ToolCallStart,
)


class Block(Body):
    """A part of a message; which fields it has depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None
    is_error: bool | None = None
    citations: list[Any] | None = None
    cache_control: dict[str, Any] | None = None


class Turn(Body):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Body):
    """A declared function."""

    name: str = Field(max_length=256)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class Choice(Body):
    """Whether tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=0)


class CountBody(Body):
    """What `count_tokens` takes."""

    model: str
    messages: list[Turn] = Field(min_length=1, max_length=10_000)
    system: str | list[Block] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Choice | None = None
    thinking: Thinking | None = None

    @property
    def thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesBody(CountBody):
    """The request."""

    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=1.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens a conversation has."""
    body = await read_model(request, CountBody)
    service.check_model(body.model)
    return JsonAnswer({"input_tokens": len(await _prompt(service, request, body))})


async def messages(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_model(request, MessagesBody)
    model = service.check_model(body.model)
    prompt = await _prompt(service, request, body)
    options = service.options
    fields = SamplingFields(temperature=body.temperature, top_p=body.top_p, top_k=body.top_k)
    # Anthropic's limit is an upper bound, so what does not fit is cut off instead of refused.
    room = service.room(len(prompt))
    params = sampling_params(
        fields,
        options,
        room=room,
        max_tokens=min(body.max_tokens, room),
        logprobs=None,
        stop=stop_texts(body.stop_sequences, options, param="stop_sequences"),
        constraint=await constraint_of(
            service,
            None,
            calls=_demand(body),
            thinking=body.thinks,
            thinking_budget=body.thinking.budget_tokens if body.thinking else None,
        ),
    )
    ticket = service.worker.submit(prompt, params, wants_steps=bool(body.stream))
    answer = _MessageAnswer(service, ticket, _tools(body), model)
    if body.stream:
        return EventStream(
            answer.events(),
            keep_alive_seconds=options.keep_alive_seconds,
            on_error=lambda error: [("error", error.body(anthropic=True))],
        )
    await unless_gone(request, service.worker.completions(ticket))
    return JsonAnswer(answer.whole())


async def _prompt(service: Service, request: Request, body: CountBody) -> list[int]:
    """Ids of the conversation. Raises: ApiError 400."""
    try:
        conversation = _conversation(body)
    except TextError as error:
        raise bad_request(str(error), param="messages") from error
    return await unless_gone(request, service.render(conversation, tools=_tools(body), thinking=body.thinks))


def _tools(body: CountBody) -> list[dict[str, Any]]:
    choice = body.tool_choice
    if choice is not None and choice.type == "none":
        return []
    declared = [
        {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
        for tool in body.tools or ()
    ]
    return checked_tools([{key: value for key, value in tool.items() if value is not None} for tool in declared])


def _demand(body: MessagesBody) -> CallDemand | None:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type == "tool" and choice.name is None:
        raise bad_request("tool_choice is of type 'tool' without a name; name the function", param="tool_choice")
    wish = {"any": "required", "tool": f":{choice.name}"}.get(choice.type, choice.type)
    return call_demand(_tools(body), wish, False if choice.disable_parallel_tool_use else None)


def _conversation(body: CountBody) -> list[Message]:
    found: list[Message] = []
    if body.system is not None:
        found.append(Message("system", _text_of(body.system)))
    for turn in body.messages:
        blocks = [Block(type="text", text=turn.content)] if isinstance(turn.content, str) else turn.content
        if turn.role == "assistant":
            found.append(_assistant(blocks))
            continue
        # Results of tools come in a user's turn and are turns of their own.
        results = [block for block in blocks if block.type == "tool_result"]
        found += [Message("tool", _text_of(each.content or ""), tool_call_id=each.tool_use_id) for each in results]
        rest = [block for block in blocks if block.type != "tool_result"]
        if rest or not results:
            found.append(Message(turn.role, _text_of(rest)))
    if found[-1].role == "assistant":
        raise TextError("the last message is the assistant's; this server cannot go on with it, so leave it out")
    return found


def _assistant(blocks: Sequence[Block]) -> Message:
    thoughts = [block.thinking or "" for block in blocks if block.type == "thinking"]
    calls = [ToolCall(block.name or "", block.input or {}, block.id) for block in blocks if block.type == "tool_use"]
    text = _text_of([block for block in blocks if block.type not in ("thinking", "redacted_thinking", "tool_use")])
    return Message("assistant", text, "".join(thoughts), tuple(calls))


def _text_of(content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            raise TextError(f"a block of type {block.type[:40]!r} cannot be used here; expected text")
    return "".join(block.text or "" for block in content)


class _MessageAnswer:
    """Writes the answer of one request, whole or as a stream."""

    def __init__(self, service: Service, ticket: Ticket, tools: list[dict[str, Any]], model: str) -> None:
        self.service, self.ticket, self.model = service, ticket, model
        self.reader = ChoiceReader(0, tools)
        self.head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self._index = -1
        self._kind = ""

    def whole(self) -> dict[str, Any]:
        """Anthropic's `message`."""
        (completion,) = self.ticket.completions
        blocks: list[dict[str, Any]] = []
        for found in self.reader.read(completion):
            match found:
                case ToolCallEvent(call):
                    blocks[-1]["input"] = dict(call.arguments)
                case ArgumentsDelta():
                    pass
                case _:
                    kind, start, text = _parts(found)
                    if kind == "tool_use" or not blocks or blocks[-1]["type"] != kind:
                        blocks.append(start)
                    if kind != "tool_use":
                        blocks[-1][kind] += text
        return {**self.head, "content": blocks, **self._end(completion), **statistics_of([self.ticket])}

    async def events(self) -> AsyncIterator[Event]:
        """Anthropic's events."""
        usage = {"input_tokens": len(self.ticket.prompt), "output_tokens": 0}
        start = {**self.head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield "message_start", {"type": "message_start", "message": start}
        async for steps in self.service.worker.steps(self.ticket):
            for step in steps:
                for found in self.reader.push(step):
                    for event in self._deltas(found):
                        yield event
        if self._index >= 0:
            yield self._stop()
        assert self.reader.completion is not None
        end = self._end(self.reader.completion)
        usage = end.pop("usage")
        yield "message_delta", {"type": "message_delta", "delta": end, "usage": usage, **statistics_of([self.ticket])}
        yield "message_stop", {"type": "message_stop"}

    def _deltas(self, found: ResponseEvent) -> list[Event]:
        if isinstance(found, ToolCallEvent):
            return []
        kind, start, text = _parts(found)
        events: list[Event] = []
        if kind != self._kind or isinstance(found, ToolCallStart):
            if self._index >= 0:
                events.append(self._stop())
            self._index, self._kind = self._index + 1, kind
            begin = {"type": "content_block_start", "index": self._index, "content_block": start}
            events.append(("content_block_start", begin))
        field = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}[kind]
        name = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}[kind]
        delta = {"type": "content_block_delta", "index": self._index, "delta": {"type": name, field: text}}
        return [*events, ("content_block_delta", delta)]

    def _stop(self) -> Event:
        return "content_block_stop", {"type": "content_block_stop", "index": self._index}

    def _end(self, completion: Completion) -> dict[str, Any]:
        by_text = isinstance(completion.stopped_by, str)
        reasons = {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}
        return {
            "stop_reason": "stop_sequence" if by_text else reasons[self.reader.finish_reason],
            "stop_sequence": completion.stopped_by if by_text else None,
            "usage": {
                "input_tokens": len(self.ticket.prompt) - completion.num_cached_tokens,
                "cache_read_input_tokens": completion.num_cached_tokens,
                "cache_creation_input_tokens": 0,
                "output_tokens": len(completion.token_ids),
            },
        }


def _parts(
    found: ReasoningDelta | ContentDelta | ToolCallStart | ArgumentsDelta,
) -> tuple[str, dict[str, Any], str]:
    """The kind of block, its beginning, and the text to add."""
    match found:
        case ReasoningDelta(text):
            return "thinking", {"type": "thinking", "thinking": "", "signature": ""}, text
        case ContentDelta(text):
            return "text", {"type": "text", "text": ""}, text
        case ToolCallStart(name):
            return (
                "tool_use",
                {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": name, "input": {}},
                "",
            )
        case ArgumentsDelta(text):
            return "tool_use", {}, text
