"""What `openmimo bench` measures: one protocol for this package's engine and for its peers.

Every method takes token ids and returns seconds. The ids come from outside and are random, a different one for each
sequence: an engine that fed all sequences the same token would read the same experts for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from openmimo.engine import PAGE_TOKENS, DraftStats, Runner
from openmimo.errors import RequestError, nearest

TargetKind = Literal["openmimo", "transformers", "llama.cpp"]
# How many MTP heads draft: a number, or as many as pay.
Drafts = int | Literal["auto"]
Weights = Literal["float32", "bf16", "int8"]
TARGET_KINDS: tuple[TargetKind, ...] = ("openmimo", "transformers", "llama.cpp")
# int8 with one fp16 scale per 32 numbers.
WEIGHT_BITS: dict[Weights, float] = {"float32": 32, "bf16": 16, "int8": 8.5}


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """How to open a target: a checkpoint folder, or a GGUF file for llama.cpp.

    `runner` and `activations` are this package's. With `probe` a peer looks for its best settings before it is timed.
    """

    kind: TargetKind
    path: Path
    weights: Weights
    threads: int
    activations: str = "auto"
    runner: str = "auto"
    with_mtp: bool = False
    probe: bool = True


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Greedy continuations and the seconds they took, prompts included."""

    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    draft: DraftStats


class BenchTarget(Protocol):
    """An engine with a model. It runs with the best of its settings, which it finds by itself before it is timed."""

    @property
    def settings(self) -> str:
        """What it last ran with, in words."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds from an empty cache to the logits after the prompt's last token."""
        ...

    def start(self, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        """Fill the cache with prompts of one length, and keep `room` for that many tokens more in each. Not timed."""
        ...

    def decode(self, steps: Sequence[Sequence[int]]) -> float:
        """Seconds of some steps, each of one given token per sequence and the logits after it. Sequences grow."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: Drafts) -> Generation:
        """Continue all prompts greedily by `num_tokens` tokens, drafting with that many MTP heads."""
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...


def open_target(spec: TargetSpec) -> BenchTarget:
    """Load a model into its engine. Raises: MimoError when that cannot be."""
    torch.set_num_threads(spec.threads)
    if spec.kind == "llama.cpp":
        from openmimo.evals.llama_peer import LlamaCppPeer

        return LlamaCppPeer(spec.path, threads=spec.threads, with_mtp=spec.with_mtp, probe=spec.probe)
    if spec.weights == "int8" and (spec.kind == "transformers" or spec.runner == "torch"):
        raise RequestError(f"{spec.kind} has no int8 weights on the CPU; leave it out or measure bf16")
    if spec.kind == "transformers":
        from openmimo.evals.transformers_peer import TransformersPeer

        return TransformersPeer(spec.path, dtype=_dtype(spec.weights), probe=spec.probe)
    if spec.kind != "openmimo":
        raise RequestError(f"no target {spec.kind!r}; {nearest(spec.kind, TARGET_KINDS)}")
    return _own_target(spec)


def _own_target(spec: TargetSpec) -> BenchTarget:
    from openmimo.engine.loading import RunnerOptions, open_runner
    from openmimo.evals.runner_target import RunnerTarget

    def make(num_rows: int, num_pages: int) -> Runner:
        options = RunnerOptions(
            kind=spec.runner,
            weights=spec.weights,
            activations=spec.activations,
            verify=False,
            max_batch=num_rows,
            step_tokens=max(512, num_rows),
            cache_tokens=num_pages * PAGE_TOKENS,
            prefix_cache_bytes=0,
            threads=spec.threads,
        )
        return open_runner(spec.path, options)

    return RunnerTarget(make)


def _dtype(weights: Weights) -> str:
    return {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}[weights]
