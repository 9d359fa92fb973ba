"""One request while it is being decoded, and the incremental way back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from openmimo.engine.request import Completion, DraftStats, Request

INCOMPLETE = "\ufffd"
# Bytes that never become a character (a model gone astray) are shown after this many tokens.
MOST_PENDING = 32


class TextCodec(Protocol):
    """The part of `openmimo.text.Tokenizer` that the engine needs."""

    @property
    def eos_token_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...


class RunningSequence:
    """What has been decoded of one request, until `finish_reason` is set.

    `limit` is the most tokens it may emit; `stop_ids` end it.
    """

    def __init__(self, request: Request, *, limit: int, stop_ids: frozenset[int], num_drafts: int) -> None:
        self.request = request
        self.limit = limit
        self.stop_ids = stop_ids
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.routes: list[npt.NDArray[np.uint8]] = []
        self.histogram = [0] * (num_drafts + 1)
        self.finish_reason: str | None = None
        self.uniforms = [] if request.params.greedy else _uniforms(request, limit)

    @property
    def next_uniform(self) -> float:
        """The random number for the next token; any value once the sequence is finished."""
        return self.uniforms[min(len(self.token_ids), self.limit - 1)]

    def take_first(self, token: int) -> list[int]:
        """Accept the token that the prompt's forward pass gave."""
        return self._append([token])

    def take_step(self, tokens: list[int]) -> list[int]:
        """Accept what a step emitted; returns the tokens that count before a stop or the limit."""
        emitted = len(tokens)
        for place, token in enumerate(tokens):
            if token in self.stop_ids:
                emitted = place + 1
                break
        self.histogram[emitted - 1] += 1
        return self._append(tokens[:emitted])

    def _append(self, tokens: list[int]) -> list[int]:
        tokens = tokens[: self.limit - len(self.token_ids)]
        self.token_ids += tokens
        if tokens[-1] in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        return tokens

    @property
    def shown_ids(self) -> list[int]:
        """The tokens that make up the text: all but a final stop token."""
        return self.token_ids[:-1] if self.finish_reason == "stop" else self.token_ids

    def complete(self, codec: TextCodec | None) -> Completion:
        """The finished record."""
        assert self.finish_reason is not None
        count, num_fed = len(self.token_ids), len(self.request.prompt_ids) + len(self.token_ids) - 1
        return Completion(
            token_ids=tuple(self.token_ids),
            text="" if codec is None else codec.decode(self.shown_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs[:count]) if self.request.params.logprobs else None,
            routed_experts=np.concatenate(self.routes)[:num_fed] if self.routes else None,
            draft=DraftStats(tuple(self.histogram)),
        )


class Detokenizer:
    """Text of a growing token list, token by token, without ever showing half a character."""

    def __init__(self, codec: TextCodec | None) -> None:
        self.codec = codec
        self.pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes."""
        if self.codec is None:
            return ""
        self.pending.append(token)
        text = self.codec.decode(self.pending)
        if text.endswith(INCOMPLETE) and len(self.pending) < MOST_PENDING:
            return ""
        self.pending.clear()
        return text

    def flush(self) -> str:
        """The text of tokens still held back."""
        text = "" if self.codec is None or not self.pending else self.codec.decode(self.pending)
        self.pending.clear()
        return text


def _uniforms(request: Request, count: int) -> list[float]:
    """Every random number of a request in advance, so that what runs beside it changes nothing."""
    generator = torch.Generator()
    if request.params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(request.params.seed + request.index)
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()
