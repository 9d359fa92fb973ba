"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from openmimo.engine import SamplingParams, StreamEvent
from openmimo.errors import TextError
from openmimo.server.errors import bad_request
from openmimo.server.extras import extras_of
from openmimo.server.formats import ResponseFormat, StructuredOutputs, constraint_of
from openmimo.server.http import Event, EventStream, JsonAnswer, read_model, unless_gone
from openmimo.server.reading import ChoiceReader, chat_logprob, token_events, token_records
from openmimo.server.sampling import Body, SamplingFields, sampling_params
from openmimo.server.service import Service, new_id
from openmimo.server.tools import (
    FunctionTool,
    NamedTool,
    ToolChoice,
    call_demand,
    call_object,
    chosen_tools,
    whole_calls,
)
from openmimo.server.usage import statistics_of, usage_of
from openmimo.server.worker import Ticket
from openmimo.text import (
    ArgumentsDelta,
    ContentDelta,
    Message,
    ReasoningDelta,
    ResponseEvent,
    ToolCallEvent,
    ToolCallStart,
    join_events,
)
from openmimo.text.messages import read_messages

OBJECT = "chat.completion"
NOTHING = ("refusal", "annotations", "audio", "function_call")


class TemplateOptions(Body):
    """What the chat template is told."""

    enable_thinking: bool | None = None


class ChatBody(SamplingFields):
    """The request. `messages` are checked by the conversation's own rules."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0)
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0, lt=2**31)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None

    @property
    def thinking(self) -> bool:
        """Whether the model is asked to think first."""
        for wish in (
            self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None,
            self.enable_thinking,
            None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal"),
        ):
            if wish is not None:
                return wish
        return False


async def chat(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_model(request, ChatBody)
    model = service.check_model(body.model)
    messages = _messages(body)
    tools = chosen_tools(body.tools, body.tool_choice)
    prompt = await unless_gone(request, service.render(messages, tools=tools, thinking=body.thinking))
    params = await _params(service, body, len(prompt), tools)
    ticket = service.worker.submit(
        prompt, params, draft_heads=service.check_heads(body.draft_heads), wants_steps=bool(body.stream)
    )
    answer = _ChatAnswer(service, body, ticket, tools, model)
    if body.stream:
        return EventStream(
            answer.events(),
            keep_alive_seconds=service.options.keep_alive_seconds,
            on_error=lambda error: [(None, error.body())],
        )
    await unless_gone(request, service.worker.completions(ticket))
    return JsonAnswer(answer.whole())


async def _params(service: Service, body: ChatBody, num_prompt: int, tools: list[dict[str, Any]]) -> SamplingParams:
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    max_tokens = body.max_completion_tokens or body.max_tokens
    if body.max_tokens == 0:
        raise bad_request("max_tokens is 0; an answer has at least one token", param="max_tokens")
    choice = f":{body.tool_choice.function.name}" if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    most = service.options.max_logprobs
    if body.top_logprobs is not None and (not body.logprobs or body.top_logprobs > most):
        raise bad_request(f"top_logprobs is {body.top_logprobs}; give 0 to {most}, and logprobs", param="top_logprobs")
    return sampling_params(
        body,
        service.options,
        room=service.room(num_prompt),
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=await constraint_of(
            service,
            body.response_format,
            body.structured_outputs,
            call_demand(tools, choice, body.parallel_tool_calls),
            thinking=body.thinking,
            thinking_budget=body.thinking_token_budget,
        ),
    )


def _messages(body: ChatBody) -> tuple[Message, ...]:
    """The conversation, checked; keys that clients hand back empty are left out. Raises: ApiError 400."""
    given = [{key: value for key, value in each.items() if value or key not in NOTHING} for each in body.messages]
    for message in given:
        # OpenAI's newer name.
        if message.get("role") == "developer":
            message["role"] = "system"
    try:
        return read_messages(given)
    except TextError as error:
        raise bad_request(str(error), param="messages") from error


class _ChatAnswer:
    """Writes the answer of one request, whole or as a stream."""

    def __init__(
        self, service: Service, body: ChatBody, ticket: Ticket, tools: list[dict[str, Any]], model: str
    ) -> None:
        self.service, self.body, self.ticket, self.tools = service, body, ticket, tools
        self.head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model}
        self.stop_ids = frozenset(service.stop_ids) | frozenset(body.stop_token_ids or ())

    def whole(self) -> dict[str, Any]:
        """OpenAI's `chat.completion`."""
        choices: list[dict[str, Any]] = []
        for completion in sorted(self.ticket.completions, key=lambda each: each.choice):
            reader = ChoiceReader(completion.choice, self.tools)
            events = reader.read(completion)
            parsed, calls = join_events(events), whole_calls(events)
            message: dict[str, Any] = {"role": "assistant", "content": parsed.content or None, "refusal": None}
            if parsed.reasoning:
                message |= {"reasoning_content": parsed.reasoning, "reasoning": parsed.reasoning}
            if calls:
                message["tool_calls"] = calls
            elif not parsed.content:
                message["content"] = ""
            records = token_records(completion, self.stop_ids)
            logprobs = [chat_logprob(record, self.service.tokenizer) for record in records]
            choices.append(
                {
                    "index": completion.choice,
                    "message": message,
                    "logprobs": {"content": logprobs, "refusal": None} if self.body.logprobs else None,
                    "finish_reason": reader.finish_reason,
                    **extras_of(completion, self.body),
                }
            )
        return {
            **self.head,
            "object": OBJECT,
            "choices": choices,
            "usage": usage_of(self.service, [self.ticket]),
            **statistics_of([self.ticket]),
        }

    async def events(self) -> AsyncIterator[Event]:
        """OpenAI's chunks."""
        readers = [ChoiceReader(choice, self.tools) for choice in range(self.ticket.num_choices)]
        for reader in readers:
            yield self._chunk(reader, {"role": "assistant", "content": ""})
        async for events in self.service.worker.steps(self.ticket):
            for event in events:
                for chunk in self._step(readers[event.choice], event):
                    yield chunk
        if self.body.wants_usage:
            usage, statistics = usage_of(self.service, [self.ticket]), statistics_of([self.ticket])
            yield None, {**self.head, "object": f"{OBJECT}.chunk", "choices": [], "usage": usage, **statistics}
        yield None, "[DONE]"

    def _step(self, reader: ChoiceReader, event: StreamEvent) -> list[Event]:
        deltas = [delta for each in reader.push(event) if (delta := self._delta(reader, each))]
        extra: dict[str, Any] = {}
        if self.body.logprobs:
            records = [chat_logprob(record, self.service.tokenizer) for record in token_records(event, self.stop_ids)]
            extra["logprobs"] = {"content": records, "refusal": None} if records else None
        if self.body.token_events:
            extra["token_events"] = token_events(event, self.service.tokenizer)
        if self.body.return_token_ids:
            extra["token_ids"] = list(event.token_ids)
        if extra and not deltas:
            deltas = [{}]
        chunks = [self._chunk(reader, delta, extra if place == 0 else {}) for place, delta in enumerate(deltas)]
        if reader.completion is not None:
            end: dict[str, Any] = {"finish_reason": reader.finish_reason, **extras_of(reader.completion, self.body)}
            chunks.append(self._chunk(reader, {}, end))
        return chunks

    def _delta(self, reader: ChoiceReader, found: ResponseEvent) -> dict[str, Any]:
        match found:
            case ReasoningDelta(text):
                return {"reasoning_content": text, "reasoning": text}
            case ContentDelta(text):
                return {"content": text}
            case ToolCallStart(name):
                reader.num_started += 1
                return {"tool_calls": [{"index": reader.num_started - 1, **call_object(name)}]}
            case ArgumentsDelta(text):
                return {"tool_calls": [{"index": reader.num_started - 1, "function": {"arguments": text}}]}
            case ToolCallEvent():
                return {}

    def _chunk(self, reader: ChoiceReader, delta: dict[str, Any], extra: dict[str, Any] | None = None) -> Event:
        choice = {"index": reader.choice, "delta": delta, "logprobs": None, "finish_reason": None, **(extra or {})}
        usage = {"usage": None} if self.body.wants_usage else {}
        return None, {**self.head, "object": f"{OBJECT}.chunk", "choices": [choice], **usage}
