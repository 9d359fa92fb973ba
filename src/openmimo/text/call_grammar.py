"""The tool calls that an answer may consist of, as a grammar in Lark's notation with llguidance's additions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from openmimo.errors import TextError
from openmimo.text.coerce import allows_text
from openmimo.text.messages import is_name
from openmimo.text.tokenizer import Tokenizer
from openmimo.text.tool_block import CLOSE, OPEN

SHARED_DEFINITIONS = ("$defs", "definitions")


def call_grammar(
    tokenizer: Tokenizer, functions: Sequence[Mapping[str, Any]], *, forced: bool, parallel: bool = True
) -> str:
    """An answer of calls of `functions`: at least one if `forced`, otherwise text with at most one behind it.

    Parameters come in the order of the schema, required ones always. A value that may be text is any text but
    `</parameter>`; others are JSON that fits their schema.
    Raises: TextError for parameters that the grammar of calls cannot carry.
    """
    opens, closes = _tag(tokenizer, OPEN), _tag(tokenizer, CLOSE)
    start = f"call{'+' if parallel else ''}" if forced else "TEXT call?"
    rules = [f"start: {start}", r"TEXT: /(.|\n)*/", r'value[suffix="</parameter>"]: /(.|\n)*/']
    rules.append(f'call: {opens} "\\n" ({" | ".join(f"f{place}" for place in range(len(functions)))}) "\\n" {closes}')
    for place, function in enumerate(functions):
        rules += _function(f"f{place}", function)
    return "\n".join(rules)


def _function(rule: str, function: Mapping[str, Any]) -> list[str]:
    schema = cast(Mapping[str, Any], function.get("parameters") or {})
    properties = cast(Mapping[str, Any], schema.get("properties") or {})
    required = set(cast(Sequence[Any], schema.get("required") or ()))
    shared = {key: schema[key] for key in SHARED_DEFINITIONS if key in schema}
    rules: list[str] = []
    parts: list[str] = []
    for place, (key, fields) in enumerate(properties.items()):
        if not is_name(key):
            raise TextError(f"parameter {key!r} of {function['name']!r}: expected a name without '<', '>', line breaks")
        name = f"{rule}_{place}"
        rules.append(f"{name}: {_quoted(f'<parameter={key}>')} {_value(fields, schema, shared)} " + r'"\n"')
        parts.append(name if key in required else f"{name}?")
    if not properties and schema.get("additionalProperties") not in (None, False):
        rules.append(f'{rule}_any: "<parameter=" /[^<>\\r\\n]+/ ">" value "\\n"')
        parts.append(f"{rule}_any*")
    head = _quoted(f"<function={function['name']}>\n")
    return [f"{rule}: {' '.join([head, *parts, _quoted('</function>')])}", *rules]


def _value(fields: object, schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    known = cast(Mapping[str, Any], fields) if isinstance(fields, Mapping) else {}
    choices = [known["const"]] if "const" in known else known.get("enum")
    if isinstance(choices, list) and choices:
        texts = [each if isinstance(each, str) else json.dumps(each) for each in cast(list[Any], choices)]
        return f'({" | ".join(map(_quoted, texts))}) "</parameter>"'
    if allows_text(known, schema):
        return "value"
    return f'%json {json.dumps({**known, **shared})} "</parameter>"'


def _tag(tokenizer: Tokenizer, tag: str) -> str:
    """As a token where the tokenizer has one for it."""
    for added in tokenizer.added_tokens:
        if added.name == tag:
            return f"<[{added.token_id}]>"
    return _quoted(tag)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
