"""What `openmimo bench` measures: one protocol for this package's engine and for its peers.

Every method takes token ids and returns seconds. The ids come from outside and are random, a different one for each
sequence: an engine that fed all sequences the same token would read the same experts for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from openmimo.engine import DraftStats, Engine, Runner, RunningBatch, SamplingParams
from openmimo.errors import RequestError, nearest

TargetKind = Literal["openmimo", "transformers", "llama.cpp"]
Weights = Literal["float32", "bf16", "int8"]
TARGET_KINDS: tuple[TargetKind, ...] = ("openmimo", "transformers", "llama.cpp")
# int8 with one fp16 scale per 32 numbers.
WEIGHT_BITS: dict[Weights, float] = {"float32": 32, "bf16": 16, "int8": 8.5}


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """How to open a target: a checkpoint folder, or a GGUF file for llama.cpp.

    `runner` is this package's. With `probe` a peer looks for its best settings before it is timed.
    """

    kind: TargetKind
    path: Path
    weights: Weights
    threads: int
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

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: int) -> Generation:
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
    if spec.runner == "native":
        return _native_target(spec)
    return EngineTarget(Engine(spec.path, runner=spec.runner, dtype=_dtype(spec.weights)))


def _native_target(spec: TargetSpec) -> BenchTarget:
    from openmimo.engine.native_runner import NativeRunner
    from openmimo.evals.runner_target import RunnerTarget

    def make(num_rows: int, num_pages: int) -> Runner:
        return NativeRunner(
            spec.path, weights=spec.weights, num_rows=num_rows, num_pages=num_pages, threads=spec.threads
        )

    return RunnerTarget(make)


def _dtype(weights: Weights) -> str:
    return {"float32": "float32", "bf16": "bfloat16", "int8": "int8"}[weights]


class EngineTarget:
    """This package's engine, with whatever runner it has."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.settings = type(engine.runner).__name__
        self._batch: RunningBatch | None = None

    def prefill(self, prompt: Sequence[int]) -> float:
        batch, ids = self._open(1), list(prompt)
        started = time.perf_counter()
        batch.prefill(0, ids)
        return time.perf_counter() - started

    def start(self, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        self._batch = self._open(len(prompts))
        for row, prompt in enumerate(prompts):
            self._batch.prefill(row, list(prompt))

    def decode(self, steps: Sequence[Sequence[int]]) -> float:
        assert self._batch is not None, "start comes before decode"
        steps_TB1 = torch.tensor(steps)[..., None]
        one_B = torch.ones(steps_TB1.shape[1], dtype=torch.int64)
        started = time.perf_counter()
        for step_B1 in steps_TB1:
            self._batch.verify(step_B1)
            self._batch.commit(one_B)
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: int) -> Generation:
        engine = self.engine.with_drafts(num_drafts, uniform_steps=False)
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        started = time.perf_counter()
        completions = engine.generate(prompts, params)
        return Generation(
            seconds=time.perf_counter() - started,
            token_ids=tuple(completion.token_ids for completion in completions),
            draft=DraftStats.merge(completion.draft for completion in completions),
        )

    def close(self) -> None:
        self._batch = None

    def _open(self, num_rows: int) -> RunningBatch:
        return self.engine.runner.open_batch(num_rows, num_drafts=0, step_tokens=1)
