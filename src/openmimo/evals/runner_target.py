"""A bench target for any `Runner`: bare steps as the engine would hand them out, and whole answers by the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from openmimo.engine import DraftStats, Engine, Runner, SamplingParams, StepInput
from openmimo.engine.runner import PAGE_TOKENS, Float32, Int32
from openmimo.evals.bench_target import Drafts, Generation

# What a runner is made for: its number of rows and of pages.
MakeRunner = Callable[[int, int], Runner]


class RunnerTarget:
    """Feeds prompts in chunks and steps of one token per row; only `generate` has a scheduler and a sampler.

    `make` builds the runner anew when a shape of work needs more rows or pages than the last one had.
    """

    def __init__(self, make: MakeRunner) -> None:
        self._make = make
        self.runner = make(1, 16)
        self.settings = " ".join(filter(None, [type(self.runner).__name__, str(getattr(self.runner, "kernels", ""))]))
        self._lengths_S = np.zeros(0, np.int32)
        self._tables: tuple[Int32, ...] = ()
        self._engine: Engine | None = None
        self._engine_rows = 0

    def prefill(self, prompt: Sequence[int]) -> float:
        self._reserve(1, len(prompt))
        ids_N = np.array(prompt, np.int32)
        started = time.perf_counter()
        self._feed_prompt(0, ids_N)
        return time.perf_counter() - started

    def start(self, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        self._reserve(len(prompts), len(prompts[0]) + room)
        for row, prompt in enumerate(prompts):
            self._feed_prompt(row, np.array(prompt, np.int32))
        self._lengths_S = np.array([len(prompt) for prompt in prompts], np.int32)

    def decode(self, steps: Sequence[Sequence[int]]) -> float:
        steps_TS = np.array(steps, np.int32)
        rows_S = np.arange(len(self._lengths_S), dtype=np.int32)
        ones_S = np.ones_like(rows_S)
        started = time.perf_counter()
        for step_S in steps_TS:
            self._forward(step_S, rows_S, self._lengths_S, ones_S, rows_S)
            self.runner.commit(rows_S, ones_S)
            self._lengths_S = self._lengths_S + 1
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: Drafts) -> Generation:
        """Greedy continuations by the engine, which schedules, samples and drafts."""
        self._reserve(len(prompts), max(map(len, prompts)) + num_tokens + self.runner.config.num_mtp_heads)
        if self._engine is None or self._engine_rows < len(prompts):
            # It is kept, so that an automatic number of drafts goes by what earlier rounds measured.
            self._engine = Engine(self.runner, max_batch=len(prompts), prefix_cache_bytes=0)
            self._engine_rows = len(prompts)
        engine = self._engine.with_drafts(num_drafts)
        started = time.perf_counter()
        completions = engine.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
        return Generation(
            seconds=time.perf_counter() - started,
            token_ids=tuple(completion.token_ids for completion in completions),
            draft=DraftStats.merge(completion.draft for completion in completions),
        )

    def close(self) -> None:
        self._tables = ()

    def _reserve(self, num_rows: int, num_tokens: int) -> None:
        pages = -(-num_tokens // PAGE_TOKENS)
        if num_rows > self.runner.num_rows or num_rows * pages > self.runner.num_pages:
            self.runner = self._make(num_rows, num_rows * pages)
            self._engine = None
        self._tables = tuple(np.arange(row * pages, (row + 1) * pages, dtype=np.int32) for row in range(num_rows))

    def _feed_prompt(self, row: int, ids_N: Int32) -> None:
        """Append a prompt to an empty row in the largest chunks that the runner takes."""
        row_S = np.array([row], np.int32)
        for start in range(0, len(ids_N), self.runner.max_step_tokens):
            chunk_N = ids_N[start : start + self.runner.max_step_tokens]
            wanted = [len(chunk_N) - 1] if start + len(chunk_N) == len(ids_N) else []
            start_S, count_S = np.array([start], np.int32), np.array([len(chunk_N)], np.int32)
            self._forward(chunk_N, row_S, start_S, count_S, np.array(wanted, np.int32))
            self.runner.commit(row_S, count_S)

    def _forward(self, ids_N: Int32, rows_S: Int32, starts_S: Int32, counts_S: Int32, logits_M: Int32) -> Float32:
        step = StepInput(
            token_ids_N=ids_N,
            rows_S=rows_S,
            starts_S=starts_S,
            counts_S=counts_S,
            page_tables=tuple(self._tables[row] for row in rows_S.tolist()),
            logits_M=logits_M,
        )
        return self.runner.forward(step).logits_MV
