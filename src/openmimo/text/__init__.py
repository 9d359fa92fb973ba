"""Tokenizer, chat template, and parsers of what a model answers."""

from __future__ import annotations

from openmimo.text.messages import Message, ToolCall
from openmimo.text.template import ChatTemplate, recommended_system_prompt
from openmimo.text.tokenizer import AddedToken, IncrementalDecoder, Tokenizer
from openmimo.text.training import train_tokenizer

__all__ = [
    "AddedToken",
    "ChatTemplate",
    "IncrementalDecoder",
    "Message",
    "Tokenizer",
    "ToolCall",
    "recommended_system_prompt",
    "train_tokenizer",
]
