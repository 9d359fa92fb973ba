"""Tools in OpenAI's layout: what a client declares, which of it counts, and how a call is written."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from openmimo.errors import TextError
from openmimo.server.errors import bad_request
from openmimo.server.sampling import Body
from openmimo.text import ToolCall
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


def chosen_tools(tools: Sequence[FunctionTool] | None, choice: ToolChoice | None) -> list[dict[str, Any]]:
    """The functions that the model is told of. Raises: ApiError 400 for a choice that cannot be kept, or bad tools."""
    if choice == "required" or isinstance(choice, NamedTool):
        raise bad_request(
            "tool_choice asks for a call, which this server cannot force; use 'auto' or 'none'",
            param="tool_choice",
            code="unsupported_parameter",
        )
    if not tools or choice == "none":
        return []
    return checked_tools([tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools])


def checked_tools(functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same functions. Raises: ApiError 400 for names that the grammar cannot carry, or that repeat."""
    try:
        return read_tools(functions)
    except TextError as error:
        raise bad_request(str(error), param="tools") from error


def call_object(call: ToolCall) -> dict[str, Any]:
    """OpenAI's object for a call that the model made."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
    }
