"""What the form of an answer is bound to: JSON schemas, and the room for thinking."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from openmimo.config.strict_json import parse_json_object
from openmimo.engine import Constraint, Grammar, Thinking
from openmimo.errors import MimoError
from openmimo.server.errors import bad_request
from openmimo.server.sampling import Body
from openmimo.server.service import Service
from openmimo.server.tools import CallDemand
from openmimo.text.call_grammar import call_grammar

COMPILE_SECONDS = 2.0


class TextFormat(Body):
    """No form."""

    type: Literal["text"]


class JsonFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFields(Body):
    """A named schema."""

    name: str = Field(default="answer", max_length=256)
    description: str | None = None
    # `schema` is taken as an attribute by the base class.
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Body):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: SchemaFields


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """vLLM's way to say it: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None


async def constraint_of(
    service: Service,
    form: ResponseFormat | None,
    structure: StructuredOutputs | None = None,
    calls: CallDemand | None = None,
    *,
    thinking: bool,
    thinking_budget: int | None = None,
) -> Constraint | None:
    """The engine's constraint, after the think block if there is one, or None.

    Raises: ApiError 400 for a form that cannot be kept, or more than one.
    """
    wanted = [] if structure is None else list(structure.model_dump(exclude_none=True, by_alias=True).items())
    match form:
        case None | TextFormat():
            pass
        case JsonFormat():
            wanted.append(("json", {"type": "object"}))
        case SchemaFormat():
            wanted.append(("json", form.json_schema.schema_))
    if calls is not None:
        wanted.append(("calls", calls))
    block = service.think_block(thinking_budget) if thinking else None
    if not wanted and structure is None:
        return None if block is None or thinking_budget is None else Grammar.think(block)
    if len(wanted) != 1:
        raise bad_request(
            f"{len(wanted)} forms are given for the answer; give one, in response_format, structured_outputs or "
            "tool_choice (parallel_tool_calls=false counts too)",
            param="structured_outputs" if calls is None else "tool_choice",
        )
    ((kind, value),) = wanted
    return await _compiled(service, kind, value, block)


async def _compiled(service: Service, kind: str, value: Any, thinking: Thinking | None) -> Grammar:
    param = {"json": "response_format", "calls": "tools"}.get(kind, "structured_outputs")
    most, size = service.options.max_grammar_bytes, len(json.dumps(value.functions if kind == "calls" else value))
    if size > most:
        raise bad_request(f"the {kind} has {size} characters; at most {most} are taken", param=param)
    work = asyncio.to_thread(_grammar, service, kind, value, thinking)
    try:
        return await asyncio.wait_for(work, COMPILE_SECONDS)
    except TimeoutError as error:
        raise bad_request(
            f"the {kind} was not understood within {COMPILE_SECONDS:.0f} s; simplify it", param=param
        ) from error
    except MimoError as error:
        raise bad_request(str(error), param=param) from error


def _grammar(service: Service, kind: str, value: Any, thinking: Thinking | None) -> Grammar:
    tokenizer = service.tokenizer
    match kind:
        case "json":
            schema = parse_json_object(value.encode(), what="the schema") if isinstance(value, str) else value
            return Grammar.json_schema(tokenizer, schema, thinking=thinking)
        case "regex":
            return Grammar.regex(tokenizer, value, thinking=thinking)
        case "choice":
            words = " | ".join(json.dumps(word, ensure_ascii=False) for word in value)
            return Grammar.lark(tokenizer, f"start: {words}", thinking=thinking)
        case "calls":
            text = call_grammar(tokenizer, value.functions, forced=value.forced, parallel=value.parallel)
            return Grammar.lark(tokenizer, text, thinking=thinking)
        case _:
            return Grammar.lark(tokenizer, value, thinking=thinking)
