"""Inference: continuous batching, sampling and MTP drafting over a `Runner`, for chat, evals, servers and rollouts."""

from openmimo.engine.engine import Engine, Prompt
from openmimo.engine.grammar import Grammar, Thinking
from openmimo.engine.loading import resolve_model_folder
from openmimo.engine.request import (
    Completion,
    Constraint,
    DraftStats,
    EngineLoad,
    PartialAnswer,
    SamplingParams,
    StreamEvent,
)
from openmimo.engine.runner import PAGE_TOKENS, RowState, Runner, StepInput, StepOutput
from openmimo.engine.text import TextCodec

__all__ = [
    "PAGE_TOKENS",
    "Completion",
    "Constraint",
    "DraftStats",
    "Engine",
    "EngineLoad",
    "Grammar",
    "PartialAnswer",
    "Prompt",
    "RowState",
    "Runner",
    "SamplingParams",
    "StepInput",
    "StepOutput",
    "StreamEvent",
    "TextCodec",
    "Thinking",
    "resolve_model_folder",
]
