"""What flows through the data package: a `Document`, and the JSON state of whoever makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from openmimo.errors import DataError

State = dict[str, Any]
"""JSON: what a source, mixture or packer needs to go on exactly where it was."""

Message = Mapping[str, Any]


class Encoder(Protocol):
    """The part of `openmimo.text.Tokenizer` that data needs."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; never a special token."""
        ...

    def special(self, name: str) -> int:
        """Id of a special token."""
        ...


class TrainingTemplate(Protocol):
    """The part of `openmimo.text.ChatTemplate` that data needs."""

    def render_training(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant wrote it."""
        ...


@dataclass(frozen=True, slots=True)
class Document:
    """A run of tokens that attends to nothing outside itself.

    Shapes: `token_ids` int32 (T,), `loss_mask` bool (T,): whether the token is a training target.
    """

    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    source: str

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of the two arrays."""
        return self.token_ids.nbytes + self.loss_mask.nbytes

    def part(self, start: int, stop: int) -> Document:
        """Tokens `start` to `stop` as a document of their own (a view, no copy)."""
        return Document(self.token_ids[start:stop], self.loss_mask[start:stop], self.source)


def whole_number(state: Mapping[str, Any], key: str) -> int:
    """The count stored under `key` of a saved state.

    Raises: DataError if it is missing or is not a whole number >= 0.
    """
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"saved data state has {key}={value!r}, expected a whole number >= 0; start without it")
    return value
