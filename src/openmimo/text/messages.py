"""Messages of a conversation, checked once where they come in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from openmimo.errors import TextError, nearest

ROLES = ("system", "user", "assistant", "tool")
FIELDS = frozenset(("role", "content", "reasoning_content", "reasoning", "tool_calls", "name", "tool_call_id"))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the assistant wants called. `call_id` is the client's name for this call, if any."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning_content` and `tool_calls` belong to the assistant, the last two to tools."""

    role: str
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise TextError(f"role {self.role!r} is unknown; {nearest(str(self.role), ROLES)}")
        if self.role != "assistant" and (self.reasoning_content or self.tool_calls):
            raise TextError(f"a {self.role} message has reasoning or tool calls; only the assistant has these")


MessageLike = Message | Mapping[str, Any]


def read_messages(messages: Sequence[MessageLike]) -> tuple[Message, ...]:
    """Check a conversation of `Message`s or of dicts in the OpenAI layout.

    Keys that carry nothing for the template (such as `refusal`) are an error unless they are None.
    Raises: TextError that names the message by its place.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise TextError("expected a list of messages with at least one entry")
    checked: list[Message] = []
    for place, message in enumerate(messages):
        try:
            checked.append(message if isinstance(message, Message) else _read_message(message))
        except TextError as error:
            raise TextError(f"message {place}: {error}") from error
    return tuple(checked)


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The declared functions, without the OpenAI wrapper `{"type": "function", "function": ...}`.

    Raises: TextError for an entry without a name, with an unusable one, or with one that was used before.
    """
    functions: list[dict[str, Any]] = []
    for place, tool in enumerate(tools or ()):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        name = cast(Mapping[str, Any], inner).get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not is_name(name):
            raise TextError(f"tool {place} has the name {name!r}; expected text without '<', '>' and line breaks")
        if any(function["name"] == name for function in functions):
            raise TextError(f"tool {place} repeats the name {name!r}; names must differ")
        parameters = cast(Mapping[str, Any], inner).get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise TextError(f"tool {name!r} has parameters of type {type(parameters).__name__}; expected a JSON schema")
        functions.append(dict(cast(Mapping[str, Any], inner)))
    return functions


def is_name(name: str) -> bool:
    """Whether the tool grammar can carry `name` as that of a function or parameter."""
    return bool(name) and name == name.strip() and not any(character in name for character in "<>\n\r")


def _read_message(message: Mapping[str, Any]) -> Message:
    if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] dicts come from outside
        raise TextError(f"expected an object with `role` and `content`, got {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    for key in given:
        if key not in FIELDS:
            raise TextError(f"unknown key {key!r}; {nearest(str(key), FIELDS)}")
    role = given.get("role")
    if not isinstance(role, str):
        raise TextError(f"role {role!r} is not text; expected one of {', '.join(ROLES)}")
    reasoning = [_text_field(given, key) for key in ("reasoning_content", "reasoning") if key in given]
    if len(set(reasoning)) > 1:
        raise TextError("reasoning and reasoning_content differ; give one of them")
    calls = given.get("tool_calls", ())
    if not isinstance(calls, list | tuple):
        raise TextError(f"tool_calls is {type(calls).__name__}; expected a list")
    if "content" not in given and not calls and not reasoning:
        raise TextError("content is missing; give text (it may be empty)")
    return Message(
        role,
        _content_text(given.get("content", "")),
        reasoning[0] if reasoning else "",
        tuple(_read_call(call) for call in cast(Sequence[Any], calls)),
        _text_field(given, "name") if "name" in given else None,
        _text_field(given, "tool_call_id") if "tool_call_id" in given else None,
    )


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise TextError(f"content is {type(content).__name__}; expected text or a list of text parts")
    texts: list[str] = []
    for part in cast(Sequence[Any], content):
        kind = cast(Mapping[str, Any], part).get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise TextError(f"content part of type {kind!r}; only text parts can be used")
        texts.append(_text_field(cast(Mapping[str, Any], part), "text"))
    return "".join(texts)


def _read_call(call: object) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    outer = cast(Mapping[str, Any], call) if isinstance(call, Mapping) else {}
    inner = outer.get("function", outer)
    fields = cast(Mapping[str, Any], inner) if isinstance(inner, Mapping) else {}
    name = fields.get("name")
    if not isinstance(name, str) or not is_name(name):
        raise TextError(f"tool call with the name {name!r}; expected text without '<', '>' and line breaks")
    arguments = fields.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise TextError(f"arguments of the call to {name!r} are not JSON: {error}") from error
    if not isinstance(arguments, Mapping):
        raise TextError(f"arguments of the call to {name!r} must be an object, got {type(arguments).__name__}")
    for key in cast(Mapping[object, Any], arguments):
        if not isinstance(key, str) or not is_name(key):
            raise TextError(f"argument {key!r} of the call to {name!r}: expected text without '<', '>', line breaks")
    call_id = outer.get("id")
    return ToolCall(name, dict(cast(Mapping[str, Any], arguments)), call_id if isinstance(call_id, str) else None)


def _text_field(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise TextError(f"{key} is {type(value).__name__}; expected text")
    return value
