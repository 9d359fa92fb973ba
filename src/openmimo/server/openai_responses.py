"""`/v1/responses`, without a memory: every request brings its whole conversation."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from fastapi import Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from openmimo.engine import Completion
from openmimo.errors import TextError
from openmimo.server.errors import bad_request
from openmimo.server.formats import JsonFormat, SchemaFields, SchemaFormat, TextFormat, constraint_of
from openmimo.server.http import Event, EventStream, JsonAnswer, read_model, unless_gone
from openmimo.server.reading import ChoiceReader
from openmimo.server.sampling import Body, SamplingFields, sampling_params
from openmimo.server.service import Service, new_id
from openmimo.server.tools import FunctionFields, NamedFunction, call_demand, checked_tools
from openmimo.server.usage import statistics_of, usage_of
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
from openmimo.text.messages import read_messages


class Part(Body):
    """A part of an item's content. Clients hand back items with keys of their own, which say nothing here."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str
    text: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(Body):
    """A message, a call, its result, or reasoning; `type` is `message` where it is missing."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: str | None = None
    id: str | None = None
    status: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    name: str | None = None
    arguments: str | None = None
    call_id: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None
    encrypted_content: str | None = None


class FlatTool(FunctionFields):
    """A function, without the wrapper of the chat route."""

    type: Literal["function"]


class FlatChoice(NamedFunction):
    """A function that must be called."""

    type: Literal["function"]


class FlatSchema(SchemaFields):
    """A schema, without the wrapper of the chat route."""

    type: Literal["json_schema"]


class TextOptions(Body):
    """The form of the answer."""

    format: TextFormat | JsonFormat | FlatSchema | None = None
    verbosity: str | None = None


class ReasoningOptions(Body):
    """Whether to think."""

    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: str | None = None


class ResponsesBody(Body):
    """The request."""

    model: str | None = Field(default=None, max_length=512)
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    tools: list[FlatTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def thinks(self) -> bool:
        return self.reasoning is not None and self.reasoning.effort not in (None, "none", "minimal")


async def respond(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = await read_model(request, ResponsesBody)
    model = service.check_model(body.model)
    tools = _tools(body)
    try:
        conversation = _conversation(body)
    except TextError as error:
        raise bad_request(str(error), param="input") from error
    prompt = await unless_gone(request, service.render(conversation, tools=tools, thinking=body.thinks))
    form = body.text.format if body.text else None
    if isinstance(form, FlatSchema):
        fields = SchemaFields.model_validate(form.model_dump(by_alias=True, exclude={"type"}))
        form = SchemaFormat(type="json_schema", json_schema=fields)
    choice = f":{body.tool_choice.name}" if isinstance(body.tool_choice, FlatChoice) else body.tool_choice
    params = sampling_params(
        SamplingFields(temperature=body.temperature, top_p=body.top_p),
        service.options,
        room=service.room(len(prompt)),
        max_tokens=body.max_output_tokens,
        logprobs=None,
        constraint=await constraint_of(
            service, form, calls=call_demand(tools, choice, body.parallel_tool_calls), thinking=body.thinks
        ),
    )
    ticket = service.worker.submit(prompt, params, wants_steps=bool(body.stream))
    answer = _ResponseAnswer(service, body, ticket, tools, model)
    if body.stream:
        return EventStream(
            answer.events(),
            keep_alive_seconds=service.options.keep_alive_seconds,
            on_error=lambda error: [("error", {"type": "error", **error.body()["error"]})],
        )
    await unless_gone(request, service.worker.completions(ticket))
    return JsonAnswer(answer.whole())


def _tools(body: ResponsesBody) -> list[dict[str, Any]]:
    for name, value in (("previous_response_id", body.previous_response_id), ("background", body.background)):
        if value:
            raise bad_request(
                f"{name} needs a server that keeps answers, which this one does not; send the whole conversation",
                param=name,
                code="unsupported_parameter",
            )
    if not body.tools or body.tool_choice == "none":
        return []
    return checked_tools([tool.model_dump(exclude_none=True, exclude={"strict", "type"}) for tool in body.tools])


def _conversation(body: ResponsesBody) -> tuple[Message, ...]:
    found: list[Message] = []
    if body.instructions is not None:
        found.append(Message("system", body.instructions))
    thoughts = ""
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for item in items:
        match item.type or "message":
            case "message":
                role = "system" if item.role == "developer" else item.role or "user"
                said = _text_of(item.content)
                found.append(Message(role, said, thoughts if role == "assistant" else ""))
                thoughts = ""
            case "reasoning":
                thoughts = _text_of(item.content) or _text_of(item.summary)
            case "function_call":
                arguments = json.loads(item.arguments or "{}") if _is_json(item.arguments) else None
                if not isinstance(arguments, dict):
                    raise TextError(f"arguments of the call to {(item.name or '')[:40]!r} are not a JSON object")
                call = ToolCall(item.name or "", arguments, item.call_id)
                last = found[-1] if found and found[-1].role == "assistant" else None
                if last is not None:
                    found[-1] = Message("assistant", last.content, last.reasoning_content, (*last.tool_calls, call))
                else:
                    found.append(Message("assistant", "", thoughts, (call,)))
                    thoughts = ""
            case "function_call_output":
                found.append(Message("tool", _text_of(item.output), tool_call_id=item.call_id))
            case other:
                raise TextError(f"items of type {other[:40]!r} cannot be used; expected messages, calls and outputs")
    return read_messages(found)


def _is_json(text: str | None) -> bool:
    try:
        json.loads(text or "{}")
    except (ValueError, RecursionError):
        return False
    return True


def _text_of(content: str | Sequence[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.text is None or not part.type.endswith("text"):
            raise TextError(f"a part of type {part.type[:40]!r} cannot be used; expected text")
    return "".join(part.text or "" for part in content)


class _Output:
    """An item of the answer while it grows."""

    def __init__(self, kind: str, name: str = "") -> None:
        self.kind, self.name, self.text = kind, name, ""
        self.is_whole = kind != "function_call"
        prefix = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}[kind]
        self.item_id = new_id(prefix)
        self.call_id = f"call_{secrets.token_hex(12)}"

    def part(self) -> dict[str, Any]:
        """Its only part of content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def item(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        base: dict[str, Any] = {"id": self.item_id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**base, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [self.part()] if status != "in_progress" else []
        if self.kind == "reasoning":
            return {**base, "summary": [], "content": content}
        return {**base, "role": "assistant", "content": content}

    def final_item(self) -> dict[str, Any]:
        """The item as it stays; a call that broke off is incomplete."""
        return self.item("completed" if self.is_whole else "incomplete")


class _ResponseAnswer:
    """Writes the answer of one request, whole or as a stream."""

    def __init__(
        self, service: Service, body: ResponsesBody, ticket: Ticket, tools: list[dict[str, Any]], model: str
    ) -> None:
        self.service, self.body, self.ticket, self.model = service, body, ticket, model
        self.reader = ChoiceReader(0, tools)
        self.response_id, self.created = new_id("resp_"), int(time.time())
        self.outputs: list[_Output] = []
        self._number = -1

    def whole(self) -> dict[str, Any]:
        """OpenAI's `response`."""
        (completion,) = self.ticket.completions
        for found in self.reader.read(completion):
            self._grow(found)
        return self._response(completion)

    async def events(self) -> AsyncIterator[Event]:
        """OpenAI's events, each with its number."""
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        async for steps in self.service.worker.steps(self.ticket):
            for step in steps:
                for found in self.reader.push(step):
                    for event in self._follow(found):
                        yield event
        if self.outputs:
            for event in self._done(self.outputs[-1]):
                yield event
        completion = self.reader.completion
        assert completion is not None
        name = "response.incomplete" if completion.finish_reason == "length" else "response.completed"
        yield self._event(name, response=self._response(completion))

    def _grow(self, found: ResponseEvent) -> tuple[_Output, bool, str]:
        """The item that goes on, whether it is a new one, and the text that it got."""
        name = ""
        match found:
            case ReasoningDelta(text):
                kind = "reasoning"
            case ContentDelta(text):
                kind = "message"
            case ToolCallStart(name):
                kind, text = "function_call", ""
            case ArgumentsDelta(text):
                kind = "function_call"
            case ToolCallEvent():
                self.outputs[-1].is_whole = True
                return self.outputs[-1], False, ""
        is_new = not self.outputs or self.outputs[-1].kind != kind or isinstance(found, ToolCallStart)
        if is_new:
            self.outputs.append(_Output(kind, name))
        self.outputs[-1].text += text
        return self.outputs[-1], is_new, text

    def _follow(self, found: ResponseEvent) -> list[Event]:
        before = self.outputs[-1] if self.outputs else None
        output, is_new, text = self._grow(found)
        events: list[Event] = []
        place = len(self.outputs) - 1
        if is_new:
            if before is not None:
                events += self._done(before)
            item = output.item("in_progress")
            events.append(self._event("response.output_item.added", output_index=place, item=item))
            if output.kind != "function_call":
                part = {**output.part(), "text": ""}
                events.append(self._event("response.content_part.added", **self._at(output), part=part))
        if text:
            events.append(self._event(f"response.{_delta_name(output)}.delta", **self._at(output), delta=text))
        return events

    def _done(self, output: _Output) -> list[Event]:
        name, at = _delta_name(output), self._at(output)
        place = self.outputs.index(output)
        if output.kind == "function_call":
            events = [self._event(f"response.{name}.done", **at, name=output.name, arguments=output.text)]
        else:
            events = [
                self._event(f"response.{name}.done", **at, text=output.text),
                self._event("response.content_part.done", **at, part=output.part()),
            ]
        return [*events, self._event("response.output_item.done", output_index=place, item=output.final_item())]

    def _at(self, output: _Output) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": output.item_id, "output_index": self.outputs.index(output)}
        return place if output.kind == "function_call" else {**place, "content_index": 0, "logprobs": []}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return kind, {"type": kind, "sequence_number": self._number, **fields}

    def _response(self, completion: Completion | None) -> dict[str, Any]:
        cut = completion is not None and completion.finish_reason == "length"
        done: dict[str, Any] = {"usage": None}
        if completion is not None:
            usage = usage_of(self.service, [self.ticket])
            done = {
                "usage": {
                    "input_tokens": usage["prompt_tokens"],
                    "input_tokens_details": usage["prompt_tokens_details"],
                    "output_tokens": usage["completion_tokens"],
                    "output_tokens_details": usage["completion_tokens_details"],
                    "total_tokens": usage["total_tokens"],
                },
                **statistics_of([self.ticket]),
            }
        status = "in_progress" if completion is None else "incomplete" if cut else "completed"
        params = self.ticket.params
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "metadata": self.body.metadata or {},
            "output": [] if completion is None else [output.final_item() for output in self.outputs],
            "parallel_tool_calls": self.body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "tool_choice": "auto" if self.body.tool_choice is None else self.body.tool_choice,
            "tools": [tool.model_dump(exclude_none=True) for tool in self.body.tools or ()],
            "top_p": params.top_p,
            "truncation": "disabled",
            **done,
        }


def _delta_name(output: _Output) -> str:
    return {
        "message": "output_text",
        "reasoning": "reasoning_text",
        "function_call": "function_call_arguments",
    }[output.kind]
