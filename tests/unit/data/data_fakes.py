"""Stand-ins that make token counts readable: one token per UTF-8 byte, roles as single tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openmimo.data.documents import Document
from openmimo.errors import TextError

END, USER, ASSISTANT = 256, 257, 258


class ByteTokenizer:
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def special(self, name: str) -> int:
        assert name == "<|endoftext|>"
        return END


class RoleTemplate:
    def render_training(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            if message.get("role") not in ("user", "assistant"):
                raise TextError(f"role {message.get('role')!r} is unknown")
            body = list(message["content"].encode())
            ids += [USER if message["role"] == "user" else ASSISTANT, *body]
            mask += [False] + [message["role"] == "assistant"] * len(body)
        return ids, mask


@dataclass(frozen=True)
class FakeProblem:
    prompt: str
    solution: str


def fake_problem(domain: str, *, split: str, level: int, seed: int, index: int, task: str | None = None) -> FakeProblem:
    digest = hashlib.blake2b(f"{domain}{task or ''}{split}{level}{seed}{index}".encode()).hexdigest()
    return FakeProblem(f"{domain} level {level} number {index}?", f"{digest[: 10 + index % 30]}\nanswer: {index}")


class CountingSource:
    """Documents of given lengths in turn; tokens count up, so that loss or repetition shows."""

    def __init__(self, name: str, lengths: Sequence[int]) -> None:
        self.name = name
        self.num_closed = 0
        self._lengths = list(lengths)
        self._made = 0
        self._tokens = 0

    def next_document(self) -> Document:
        length = self._lengths[self._made % len(self._lengths)]
        ids = np.arange(self._tokens, self._tokens + length, dtype=np.int32)
        self._made += 1
        self._tokens += length
        return Document(ids, np.ones(length, np.bool_), self.name)

    def state(self) -> dict[str, Any]:
        return {"made": self._made, "tokens": self._tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._made, self._tokens = state["made"], state["tokens"]

    def close(self) -> None:
        self.num_closed += 1
