"""Inference: greedy decoding with MTP drafts, plain sampling, one batch API for chat, evals and rollouts."""

from openmimo.engine.engine import Engine, resolve_model_folder
from openmimo.engine.request import Completion, DraftStats, Request, SamplingParams, StreamEvent
from openmimo.engine.runner import RowState, Runner, StepInput, StepOutput
from openmimo.engine.torch_batch import RunningBatch, TorchRunner

__all__ = [
    "Completion",
    "DraftStats",
    "Engine",
    "Request",
    "RowState",
    "Runner",
    "RunningBatch",
    "SamplingParams",
    "StepInput",
    "StepOutput",
    "StreamEvent",
    "TorchRunner",
    "resolve_model_folder",
]
