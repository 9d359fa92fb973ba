"""Tools in OpenAI's layout: what a client declares, which of it counts, and how a call is written."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from openmimo.errors import TextError
from openmimo.server.errors import bad_request
from openmimo.server.sampling import Body
from openmimo.text import ArgumentsDelta, ResponseEvent, ToolCallStart
from openmimo.text.messages import read_tools


class FunctionFields(Body):
    """A declared function; `parameters` is a JSON schema."""

    name: str = Field(max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    """A tool that is a function."""

    type: Literal["function"] = "function"
    function: FunctionFields


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True)
class CallDemand:
    """What the calls of an answer are bound to: `forced` to be one of these functions, or at most one of them."""

    functions: list[dict[str, Any]]
    forced: bool
    parallel: bool


def chosen_tools(tools: Sequence[FunctionTool] | None, choice: ToolChoice | None) -> list[dict[str, Any]]:
    """The functions that the model is told of. Raises: ApiError 400 for bad ones."""
    if not tools or choice == "none":
        return []
    return checked_tools([tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools])


def call_demand(functions: list[dict[str, Any]], choice: str | None, parallel: bool | None) -> CallDemand | None:
    """What a choice means: "none", "auto", "required", or the name of a function behind a colon; None without a bound.

    Raises: ApiError 400 for a choice that cannot be kept.
    """
    allowed = functions
    if choice is not None and choice.startswith(":"):
        allowed = [function for function in functions if function["name"] == choice[1:]]
        if not allowed:
            names = ", ".join(function["name"] for function in functions) or "none"
            raise bad_request(
                f"tool_choice asks for {choice[1:][:100]!r}, which tools do not declare; they declare {names}",
                param="tool_choice",
            )
    forced = choice is not None and choice not in ("none", "auto")
    if forced and not functions:
        raise bad_request("tool_choice asks for a call, but no tools are given; declare one", param="tool_choice")
    # One function that must be called is called once, as with OpenAI.
    once = parallel is False or allowed is not functions
    return CallDemand(allowed, forced, not once) if functions and (forced or once) else None


def checked_tools(functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same functions. Raises: ApiError 400 for names that the grammar cannot carry, or that repeat."""
    try:
        return read_tools(functions)
    except TextError as error:
        raise bad_request(str(error), param="tools") from error


def call_object(name: str, arguments: str = "") -> dict[str, Any]:
    """OpenAI's object for a call that the model makes."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def whole_calls(events: Sequence[ResponseEvent]) -> list[dict[str, Any]]:
    """The calls of a whole answer. One that broke off has the arguments as far as they came, which are no JSON then."""
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            calls.append(call_object(event.name))
        elif isinstance(event, ArgumentsDelta):
            calls[-1]["function"]["arguments"] += event.text
    return calls
