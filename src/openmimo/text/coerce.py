"""A tool argument arrives as text; the declared JSON schema says what it means."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

# Canonical only: an identifier such as 007 stays text where text is allowed.
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,4000})")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_MAX_DEPTH = 8
_EXACT_FLOAT = 2**53
_UNREADABLE = object()

Schema = Mapping[str, Any]


def coerce_argument(text: str, schema: object, root: Schema) -> Any:
    """The value that `text` stands for under `schema`; `root` is the schema that `$ref` points into.

    Of several allowed types the narrowest that fits wins: null, boolean, integer, number, object, array,
    string. Text that fits none stays as it is, as does any text without a declared type.
    """
    kinds = _kinds(schema, root, _MAX_DEPTH)
    trimmed = text.strip(" \t\r\n")
    for kind, read in _READERS:
        if kind in kinds and (value := read(trimmed)) is not _UNREADABLE:
            return value
    return text


def is_text(schema: object, root: Schema) -> bool:
    """Whether every text stays as it is under `schema`."""
    return not _kinds(schema, root, _MAX_DEPTH) & {kind for kind, _ in _READERS}


def allows_text(schema: object, root: Schema) -> bool:
    """Whether any text is a value under `schema`."""
    kinds = _kinds(schema, root, _MAX_DEPTH)
    return not kinds or "string" in kinds


def _kinds(schema: object, root: Schema, depth: int) -> set[str]:
    """The JSON types that a schema allows; empty if it does not say."""
    if not isinstance(schema, Mapping) or depth == 0:
        return set()
    fields = cast(Schema, schema)
    declared = fields.get("type")
    kinds = {declared} if isinstance(declared, str) else _texts(declared)
    if fields.get("nullable") is True:
        kinds.add("null")
    for key in ("anyOf", "oneOf", "allOf"):
        for option in _items(fields.get(key)):
            kinds |= _kinds(option, root, depth - 1)
    if isinstance(fields.get("$ref"), str):
        kinds |= _kinds(_resolve(fields["$ref"], root), root, depth - 1)
    if not kinds:
        values = [fields["const"]] if "const" in fields else _items(fields.get("enum"))
        kinds = {_kind_of(value) for value in values}
    return kinds


def _resolve(reference: str, root: Schema) -> object:
    found: object = root if reference.startswith("#/") else None
    for step in reference[2:].split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _items(value: object) -> Sequence[Any]:
    return cast(Sequence[Any], value) if isinstance(value, list | tuple) else ()


def _texts(value: object) -> set[str]:
    return {item for item in _items(value) if isinstance(item, str)}


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) else "number"
    return "array" if isinstance(value, list) else "object" if isinstance(value, Mapping) else "string"


def _read_null(text: str) -> Any:
    return None if text.lower() in ("null", "none") else _UNREADABLE


def _read_boolean(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), _UNREADABLE)


def _read_integer(text: str) -> Any:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = _read_number(text)
    whole = isinstance(number, float) and number.is_integer() and abs(number) < _EXACT_FLOAT
    return int(number) if whole else _UNREADABLE


def _read_number(text: str) -> Any:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else _UNREADABLE


def _read_object(text: str) -> Any:
    value = _read_json(text)
    return cast(Any, value) if isinstance(value, dict) else _UNREADABLE


def _read_array(text: str) -> Any:
    value = _read_json(text)
    return cast(Any, value) if isinstance(value, list) else _UNREADABLE


def _read_json(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _UNREADABLE


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_READERS = (
    ("null", _read_null),
    ("boolean", _read_boolean),
    ("integer", _read_integer),
    ("number", _read_number),
    ("object", _read_object),
    ("array", _read_array),
)
