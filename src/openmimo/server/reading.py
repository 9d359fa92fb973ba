"""One answer as it comes from the engine, taken apart into reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.engine import Completion, StreamEvent
from openmimo.text import ResponseEvent, ResponseParser, Tokenizer, ToolCallEvent


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """A token with its log-probability and the most probable ones in its place."""

    token_id: int
    logprob: float
    best: Mapping[int, float]


class ChoiceReader:
    """Reads the events of one choice. `tools` are the declared functions; calls of others stay text."""

    def __init__(self, choice: int, tools: Sequence[Mapping[str, Any]]) -> None:
        self.choice = choice
        self.completion: Completion | None = None
        self.num_calls = 0  # complete ones
        self.num_started = 0
        self._parser = ResponseParser(tools, stream_arguments=True)

    def push(self, event: StreamEvent) -> list[ResponseEvent]:
        """What the event completes; the last event sets `completion`."""
        found = self._parser.push(event.text)
        if event.completion is not None:
            self.completion = event.completion
            found += self._parser.finish()
        self.num_calls += sum(isinstance(each, ToolCallEvent) for each in found)
        return found

    def read(self, completion: Completion) -> list[ResponseEvent]:
        """A whole answer at once."""
        return self.push(StreamEvent(token_ids=(), pieces=(completion.text,), drafted=(), completion=completion))

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for how the answer ended."""
        assert self.completion is not None
        reason = self.completion.finish_reason
        return "tool_calls" if self.num_calls and reason == "stop" else reason


def token_records(found: StreamEvent | Completion, stop_ids: frozenset[int]) -> list[TokenRecord]:
    """The records of a step's or an answer's tokens; a final stop token is no part of the answer."""
    if found.logprobs is None:
        return []
    best = found.top_logprobs or ({},) * len(found.token_ids)
    return [
        TokenRecord(token_id=token, logprob=logprob, best=top)
        for token, logprob, top in zip(found.token_ids, found.logprobs, best, strict=True)
        if token not in stop_ids
    ]


def token_events(event: StreamEvent, tokenizer: Tokenizer) -> dict[str, Any]:
    """A step in full, for those who want to see drafting at work.

    Every token with the text that it completes (`piece`) and the head that proposed it, from 1, or null; and the drafts
    that were not kept.
    """
    heads = [head for head in event.drafted if head is not None]
    best = event.top_logprobs or ({},) * len(event.token_ids)
    logprobs = event.logprobs or (None,) * len(event.token_ids)
    return {
        "tokens": [
            {
                "id": token,
                "text": tokenizer.decode([token]),
                "piece": piece,
                "head": None if head is None else head + 1,
                "logprob": logprob,
                "top": [[other, tokenizer.decode([other]), value] for other, value in top.items()],
            }
            for token, piece, head, logprob, top in zip(
                event.token_ids, event.pieces, event.drafted, logprobs, best, strict=True
            )
        ],
        "rejected": [
            {"id": token, "text": tokenizer.decode([token]), "head": len(heads) + place + 1}
            for place, token in enumerate(event.rejected)
        ],
    }


def chat_logprob(record: TokenRecord, tokenizer: Tokenizer) -> dict[str, Any]:
    """An entry of OpenAI's `logprobs.content`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    top = [entry(token, logprob) for token, logprob in record.best.items()]
    return {**entry(record.token_id, record.logprob), "top_logprobs": top}
