"""llama.cpp as a target of `openmimo bench`, with the best of its options for each shape of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

from openmimo.engine import DraftStats
from openmimo.errors import RequestError
from openmimo.evals.bench_target import Drafts, Generation
from openmimo.evals.llama_cpp import ContextOptions, LlamaContext, LlamaModel
from openmimo.evals.llama_drafts import LlamaDrafter

MICRO_BATCHES = (128, 512, 2048)
# Options are compared on a shorter context where the real one would take minutes.
MOST_PROBED = 4096
PROBE_STEPS = 16


class LlamaCppPeer:
    """One GGUF file. `prefill`, `decode` and `generate` each find their options when they first meet a shape."""

    def __init__(self, path: str | Path, *, threads: int, with_mtp: bool = False, probe: bool = True) -> None:
        self.model = LlamaModel(path, with_mtp=with_mtp)
        self.threads, self.probe = threads, probe
        self.settings = ""
        self._context: LlamaContext | None = None
        self._best: dict[tuple[str, int, int], ContextOptions] = {}
        self._drafter: tuple[int, LlamaDrafter] | None = None

    def prefill(self, prompt: Sequence[int]) -> float:
        def seconds(options: ContextOptions) -> float:
            return min(self._prefill(prompt[:MOST_PROBED], options) for _ in range(2))

        candidates = self._prefill_options(len(prompt))
        return self._prefill(prompt, self._choose(("prefill", 1, len(prompt)), candidates, seconds))

    def start(self, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        context_tokens = len(prompts[0])
        probe = [prompt[:MOST_PROBED] for prompt in prompts]

        def seconds(options: ContextOptions) -> float:
            self._fill(probe, PROBE_STEPS * 3, options)
            steps = [[prompt[step % len(prompt)] for prompt in prompts] for step in range(PROBE_STEPS)]
            return min(self.decode(steps) for _ in range(3))

        unified = (False, True) if len(prompts) > 1 else (False,)
        candidates = [ContextOptions(flash=flash, unified=one) for flash, one in product((True, False), unified)]
        self._fill(prompts, room, self._choose(("decode", len(prompts), context_tokens), candidates, seconds))

    def decode(self, steps: Sequence[Sequence[int]]) -> float:
        context = self._context
        assert context is not None, "start comes before decode"
        started = time.perf_counter()
        for step in steps:
            context.feed(step)
            context.logits(len(step) - 1)
            context.advance(len(step))
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: Drafts) -> Generation:
        if num_drafts == "auto":
            raise RequestError("llama.cpp does not choose the number of drafts; give a number")
        if num_drafts == 0 and len(prompts) > 1:
            return self._generate_together(prompts, num_tokens)
        drafter = self._open_drafter(max(map(len, prompts)) + num_tokens, num_drafts)
        started = time.perf_counter()
        results = [drafter.generate(prompt, num_tokens) for prompt in prompts]
        return Generation(
            seconds=time.perf_counter() - started,
            token_ids=tuple(tuple(text) for text, _ in results),
            draft=DraftStats.merge(stats for _, stats in results),
        )

    def close(self) -> None:
        for user in (self._context, self._drafter[1] if self._drafter else None):
            if user is not None:
                user.close()
        self._context = self._drafter = None
        self.model.close()

    def _choose(
        self,
        work: tuple[str, int, int],
        candidates: Sequence[ContextOptions],
        seconds: Callable[[ContextOptions], float],
    ) -> ContextOptions:
        if not self.probe:
            return candidates[0]
        if work not in self._best:
            self._best[work] = min(candidates, key=seconds)
        return self._best[work]

    def _prefill(self, prompt: Sequence[int], options: ContextOptions) -> float:
        context = self._open(len(prompt), 1, options)
        started = time.perf_counter()
        context.prefill(0, prompt)
        return time.perf_counter() - started

    @staticmethod
    def _prefill_options(num_tokens: int) -> list[ContextOptions]:
        # A micro-batch beyond the prompt changes nothing.
        sizes = [size for size in MICRO_BATCHES if size < num_tokens] + [
            next((size for size in MICRO_BATCHES if size >= num_tokens), MICRO_BATCHES[-1])
        ]
        return [
            ContextOptions(flash=flash, micro_batch=size) for flash in (True, False) for size in dict.fromkeys(sizes)
        ]

    def _fill(self, prompts: Sequence[Sequence[int]], room: int, options: ContextOptions) -> None:
        context = self._open(len(prompts[0]) + room, len(prompts), options)
        for sequence, prompt in enumerate(prompts):
            context.prefill(sequence, prompt)
        rows = range(len(prompts))
        context.prepare([len(prompt) for prompt in prompts], list(rows), [True for _ in rows])

    def _open(self, num_tokens: int, num_sequences: int, options: ContextOptions) -> LlamaContext:
        """An empty context; the last one where it fits, because making one takes a while."""
        self.settings = str(options)
        wanted = (num_tokens, num_sequences, options)
        if self._context is not None and self._context.shape == wanted:
            self._context.clear()
            return self._context
        if self._context is not None:
            self._context.close()
        self._context = LlamaContext(
            self.model, num_tokens=num_tokens, num_sequences=num_sequences, threads=self.threads, options=options
        )
        return self._context

    def _open_drafter(self, num_tokens: int, num_drafts: int) -> LlamaDrafter:
        if self._drafter is None or self._drafter[0] < num_tokens or self._drafter[1].num_drafts != num_drafts:
            if self._drafter is not None:
                self._drafter[1].close()
            options = ContextOptions()
            self.settings = str(options)
            drafter = LlamaDrafter(
                self.model, num_tokens=num_tokens, num_drafts=num_drafts, threads=self.threads, options=options
            )
            self._drafter = (num_tokens, drafter)
        return self._drafter[1]

    def _generate_together(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        """Plain greedy decoding of all prompts in one batch."""
        longest = max(map(len, prompts))
        context = self._open(longest + num_tokens, len(prompts), ContextOptions())
        started = time.perf_counter()
        texts: list[list[int]] = []
        for sequence, prompt in enumerate(prompts):
            texts.append([int(context.prefill(sequence, prompt)[0].argmax())])
        rows = list(range(len(prompts)))
        context.prepare([len(prompt) for prompt in prompts], rows, [True for _ in rows])
        for _ in range(num_tokens - 1):
            context.feed([text[-1] for text in texts])
            for row, text in enumerate(texts):
                text.append(int(context.logits(row).argmax()))
            context.advance(len(rows))
        return Generation(
            seconds=time.perf_counter() - started,
            token_ids=tuple(map(tuple, texts)),
            draft=DraftStats((len(rows) * (num_tokens - 1),)),
        )
