"""Tokenizer, chat template, and parsers of what a model answers."""

from __future__ import annotations

from openmimo.text.messages import Message, ToolCall
from openmimo.text.mimo_template import DEFAULT_SYSTEM
from openmimo.text.parsers import (
    ArgumentsDelta,
    ContentDelta,
    ParsedResponse,
    ReasoningDelta,
    ResponseEvent,
    ResponseParser,
    ToolCallEvent,
    ToolCallStart,
    join_events,
    parse_response,
)
from openmimo.text.template import ChatTemplate, recommended_system_prompt
from openmimo.text.tokenizer import AddedToken, IncrementalDecoder, Tokenizer
from openmimo.text.training import train_tokenizer

__all__ = [
    "DEFAULT_SYSTEM",
    "AddedToken",
    "ArgumentsDelta",
    "ChatTemplate",
    "ContentDelta",
    "IncrementalDecoder",
    "Message",
    "ParsedResponse",
    "ReasoningDelta",
    "ResponseEvent",
    "ResponseParser",
    "Tokenizer",
    "ToolCall",
    "ToolCallEvent",
    "ToolCallStart",
    "join_events",
    "parse_response",
    "recommended_system_prompt",
    "train_tokenizer",
]
