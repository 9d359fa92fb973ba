"""What a model answered, taken apart: reasoning, content and tool calls, at once or as it streams.

Rules:
- Reasoning is a `<think>` block at the start, or several in a row (models repeat the empty block that the
  prompt ended with). Without one, everything is content. A block that is never closed is all reasoning.
- Reasoning and content keep every character, so that rendering a parsed message gives the model's text again.
- A tool call is taken out wherever it stands, in a think block too: models do put calls there, and the caller
  wants the call. But a block in reasoning must be complete before `</think>`.
- A call to a function that was not declared, and a block that breaks the grammar, stay text. Without
  declarations (`tools=None`) every name counts, and all arguments are text.
- White space that only separates blocks (after `</think>` or `</tool_call>`, before `<tool_call>` or the end)
  is dropped.

With `stream_arguments`, a call to a declared function outside of reasoning counts from its first parameter on, and
its arguments are passed on as they grow. What breaks the grammar after that leaves an unfinished call behind, whose
JSON is never closed, instead of text; a call that only lacks `</tool_call>` is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openmimo.errors import TextError
from openmimo.text.call_stream import ArgumentsWriter
from openmimo.text.coerce import coerce_argument
from openmimo.text.messages import ToolCall, read_tools
from openmimo.text.tool_block import OPEN, SPACE, THINK_END, ToolBlock, Verdict, unfinished_tag

THINK_START = "<think>"


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A tool call begins, where arguments are streamed; every complete call has this event too."""

    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of the arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """A complete tool call."""

    call: ToolCall


ResponseEvent = ReasoningDelta | ContentDelta | ToolCallStart | ArgumentsDelta | ToolCallEvent


@dataclass(frozen=True, slots=True)
class ParsedResponse:
    """A whole answer; what is absent is empty."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]


def parse_response(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> ParsedResponse:
    """Take a complete answer apart, under the rules at the top of this module.

    `tools` are the declared functions in the OpenAI layout; their schemas give the arguments types.
    Raises: TextError if `tools` cannot be used. Any `text` is fine.
    """
    parser = ResponseParser(tools)
    return join_events([*parser.push(text), *parser.finish()])


def join_events(events: Sequence[ResponseEvent]) -> ParsedResponse:
    """The answer that a stream of events amounts to."""
    return ParsedResponse(
        "".join(event.text for event in events if isinstance(event, ReasoningDelta)),
        "".join(event.text for event in events if isinstance(event, ContentDelta)),
        tuple(event.call for event in events if isinstance(event, ToolCallEvent)),
    )


class ResponseParser:
    """`parse_response` for text that arrives in pieces: the events join to the same result, however it is cut.

    Text is passed on as soon as it cannot be the start of a tag; tool calls when they are complete, or their arguments
    as they grow.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None, *, stream_arguments: bool = False) -> None:
        self._tools = None if tools is None else {tool["name"]: tool.get("parameters") for tool in read_tools(tools)}
        self._events: list[ResponseEvent] = []
        self._buffer = ""
        self._held_space = ""
        self._block: ToolBlock | None = None
        self._writer: ArgumentsWriter | None = None
        self._streams = stream_arguments
        self._thinking = False
        # Only white space since the start of the answer or the end of a block.
        self._opening = True
        self._may_think = True
        self._had_block = False
        self._finished = False

    def push(self, text: str) -> list[ResponseEvent]:
        """The events that `text` completes. Raises: TextError after `finish`."""
        if self._finished:
            raise TextError("the answer is finished; use a new ResponseParser for the next one")
        return self._read(text, final=False)

    def finish(self) -> list[ResponseEvent]:
        """The events of what was still waiting: the answer ends here."""
        events = self._read("", final=True)
        self._finished = True
        return events

    def _read(self, text: str, *, final: bool) -> list[ResponseEvent]:
        self._buffer += text
        while self._buffer and self._step(final):
            pass
        events, self._events = self._events, []
        return events

    def _step(self, final: bool) -> bool:
        """Use up part of the buffer; False if the rest has to wait."""
        if self._block is not None:
            return self._step_block(self._block, final)
        if self._opening:
            return self._step_opening(final)
        return self._step_text(final)

    def _step_opening(self, final: bool) -> bool:
        body = self._buffer.lstrip(SPACE)
        tags = (THINK_START, OPEN) if self._may_think else (OPEN,)
        if not final and any(tag.startswith(body) for tag in tags if tag != body):
            return False
        if not body and self._had_block:
            self._buffer = ""
        elif self._may_think and body.startswith(THINK_START):
            self._buffer = body.removeprefix(THINK_START)
            self._thinking, self._opening = True, False
        elif body.startswith(OPEN):
            self._held_space = self._buffer[: len(self._buffer) - len(body)]
            self._buffer = body
            self._block = ToolBlock(in_thinking=False)
        else:
            self._opening = self._may_think = False
        return True

    def _step_text(self, final: bool) -> bool:
        tags = (THINK_END, OPEN) if self._thinking else (OPEN,)
        places = {place: tag for tag in tags if (place := self._buffer.find(tag)) >= 0}
        if not places:
            waiting = 0 if final else unfinished_tag(self._buffer, *tags)
            self._emit(self._take(len(self._buffer) - waiting))
            return False
        first = min(places)
        self._emit(self._take(first))
        if places[first] == OPEN:
            self._block = ToolBlock(in_thinking=self._thinking)
        else:
            self._take(len(THINK_END))
            self._thinking, self._opening, self._had_block = False, True, True
        return True

    def _step_block(self, block: ToolBlock, final: bool) -> bool:
        verdict = block.advance(self._buffer, final=final)
        known = self._tools is None or block.name in self._tools
        if self._streams and known and block.has_begun and not self._thinking:
            self._stream(block)
            if verdict is Verdict.FAILED and block.has_ended:
                verdict = Verdict.DONE
        if verdict is Verdict.WAIT:
            return False
        self._block = None
        if verdict is Verdict.DONE and known:
            self._take(block.end)
            self._end_call(self._call(block))
        elif self._writer is not None:
            # Unfinished; of an answer that ends here, nothing is left.
            self._take(len(self._buffer) if final else block.end)
            self._end_call(None)
        else:
            # A failed block may hide a good one, so only its first tag is text for sure.
            self._emit(self._held_space + self._take(block.end if verdict is Verdict.DONE else len(OPEN)))
            self._held_space = ""
            if not self._thinking:
                self._opening = self._may_think = False
        return True

    def _stream(self, block: ToolBlock) -> None:
        if self._writer is None:
            self._writer = ArgumentsWriter(self._schema(block.name))
            self._events.append(ToolCallStart(block.name))
        if more := self._writer.more(block, self._buffer):
            self._events.append(ArgumentsDelta(more))

    def _end_call(self, call: ToolCall | None) -> None:
        self._held_space = ""
        if call is not None:
            if self._streams:
                if self._writer is None:
                    self._events += [ToolCallStart(call.name), ArgumentsDelta(_dumped(call))]
                else:
                    self._events.append(ArgumentsDelta(self._writer.end()))
            self._events.append(ToolCallEvent(call))
        self._writer = None
        if not self._thinking:
            self._opening, self._may_think, self._had_block = True, False, True

    def _call(self, block: ToolBlock) -> ToolCall:
        schema = self._schema(block.name)
        properties = schema.get("properties")
        known = properties if isinstance(properties, Mapping) else {}
        return ToolCall(
            block.name, {key: coerce_argument(value, known.get(key), schema) for key, value in block.parameters}
        )

    def _schema(self, name: str) -> Mapping[str, Any]:
        return (self._tools or {}).get(name) or {}

    def _take(self, length: int) -> str:
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    def _emit(self, text: str) -> None:
        if text:
            self._events.append(ReasoningDelta(text) if self._thinking else ContentDelta(text))


def _dumped(call: ToolCall) -> str:
    return json.dumps(call.arguments, ensure_ascii=False)
