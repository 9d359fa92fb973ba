from __future__ import annotations

from typing import Any

import pytest

from openmimo.text.coerce import coerce_argument

ROOT = {"$defs": {"Point": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}}
POINT = {"$ref": "#/$defs/Point"}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, " 3 ", " 3 "),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, " 3\n", 3),
        ({"type": "integer"}, "-0", 0),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "integer"}, "3.5", "3.5"),
        ({"type": "integer"}, "007", "007"),
        ({"type": "integer"}, "1_000", "1_000"),
        ({"type": "integer"}, "\u0663", "\u0663"),
        ({"type": "integer"}, "9" * 5000, "9" * 5000),
        ({"type": "number"}, "3", 3),
        ({"type": "number"}, "-2.5e3", -2500.0),
        ({"type": "number"}, "1e400", "1e400"),
        ({"type": "number"}, "nan", "nan"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, '[1, "a"]', [1, "a"]),
        ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "object"}, '{"a": {"b": null}}', {"a": {"b": None}}),
        ({"type": "object"}, '{"a": NaN}', '{"a": NaN}'),
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"type": "array"}, "[" * 100_000, "[" * 100_000),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "x", "x"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "05", "05"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"const": None}, "null", None),
        (POINT, '{"x": 1}', {"x": 1}),
        ({"anyOf": [POINT, {"type": "null"}]}, "null", None),
        ({"$ref": "#/$defs/Loop"}, "1", "1"),
        ({"$ref": "http://elsewhere"}, "1", "1"),
        ({"$ref": "#/$defs/None"}, "1", "1"),
        ({}, "1", "1"),
        (None, "1", "1"),
        ({"type": 5, "anyOf": 7, "enum": "x"}, "1", "1"),
    ],
)  # fmt: skip
def test_text_becomes_the_declared_type_or_stays_text(schema: Any, text: str, value: Any) -> None:
    result = coerce_argument(text, schema, ROOT)
    assert result == value
    assert type(result) is type(value)
