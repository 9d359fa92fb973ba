"""The arguments of a tool call as JSON that grows while the call is still being written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openmimo.text.coerce import coerce_argument, is_text
from openmimo.text.tool_block import ToolBlock


class ArgumentsWriter:
    """Writes the parameters of one block as a JSON object, piece by piece.

    A value that can only be text goes out as it arrives; any other when it is complete, because only then is it known
    what it means. The pieces depend on nothing but the text so far, and join to `json.dumps` of the arguments.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        properties = schema.get("properties")
        self._schema = schema
        self._properties: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        self._num_parameters = 0
        self._num_sent: int | None = None  # characters of the value that is being written

    def more(self, block: ToolBlock, text: str) -> str:
        """What `text`, the block so far, adds."""
        pieces: list[str] = []
        for key, value in block.parameters[self._num_parameters :]:
            if self._num_sent is None:
                written = json.dumps(self._value(key, value), ensure_ascii=False)
                pieces.append(f"{self._begin(key)}{written}")
            else:
                pieces.append(_escaped(value[self._num_sent :]) + '"')
            self._num_parameters, self._num_sent = self._num_parameters + 1, None
        open_value = block.open_value(text)
        if open_value is not None:
            key, value = open_value
            if is_text(self._properties.get(key), self._schema):
                if self._num_sent is None:
                    pieces.append(f'{self._begin(key)}"')
                    self._num_sent = 0
                pieces.append(_escaped(value[self._num_sent :]))
                self._num_sent = len(value)
        return "".join(pieces)

    def end(self) -> str:
        """What closes the object."""
        return "}" if self._num_parameters else "{}"

    def _value(self, key: str, text: str) -> Any:
        return coerce_argument(text, self._properties.get(key), self._schema)

    def _begin(self, key: str) -> str:
        return f"{', ' if self._num_parameters else '{'}{json.dumps(key, ensure_ascii=False)}: "


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
