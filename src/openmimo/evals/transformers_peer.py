"""transformers as a target of `openmimo bench`, with the best of its expert implementations.

Attention is its `eager` one: version 5.23 has no other for this model, because of the sinks.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from openmimo.errors import RequestError
from openmimo.evals.bench_target import Drafts, Generation

EXPERTS = ("eager", "grouped_mm", "batched_mm")
# batched_mm copies the chosen experts of every token.
BATCHED_LIMIT_BYTES = 1 << 30
PROBE_STEPS = 4
MOST_PROBED = 1024


class TransformersPeer:
    """`MiMoV2FlashForCausalLM` with its own dynamic cache, fed one step at a time. It ignores MTP heads."""

    @torch.inference_mode()
    def __init__(self, folder: str | Path, *, dtype: str, probe: bool = True) -> None:
        try:
            transformers: Any = importlib.import_module("transformers")
        except ImportError as error:
            raise RequestError(f"transformers cannot be used: {error}; install openmimo[bench]") from error
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model: Any = transformers.MiMoV2FlashForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        self.settings, self.probe = "", probe
        self._best: dict[tuple[str, int, int], str] = {}
        self._cache: Any = None

    def prefill(self, prompt: Sequence[int]) -> float:
        key = ("prefill", 1, len(prompt))
        probe = prompt[:MOST_PROBED]
        self._apply(self._choose(key, len(probe), lambda: self._prefill([probe])))
        return self._prefill([prompt])

    def start(self, prompts: Sequence[Sequence[int]], *, room: int) -> None:
        key = ("decode", len(prompts), len(prompts[0]))
        probe = [prompt[:MOST_PROBED] for prompt in prompts]

        def seconds() -> float:
            self._prefill(probe)
            return self.decode([[prompt[step] for prompt in prompts] for step in range(PROBE_STEPS)])

        self._apply(self._choose(key, len(prompts), seconds))
        self._prefill(prompts)

    @torch.inference_mode()
    def decode(self, steps: Sequence[Sequence[int]]) -> float:
        assert self._cache is not None, "start comes before decode"
        steps_TB1 = torch.tensor(steps)[..., None]
        started = time.perf_counter()
        for step_B1 in steps_TB1:
            self._cache = self.model(step_B1, past_key_values=self._cache, use_cache=True).past_key_values
        return time.perf_counter() - started

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, num_drafts: Drafts) -> Generation:
        raise RequestError("transformers cannot draft with MTP heads; compare with llama.cpp")

    def close(self) -> None:
        self._cache = self.model = None

    @torch.inference_mode()
    def _prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        self._cache = None
        tokens_BT = torch.tensor(prompts)
        started = time.perf_counter()
        self._cache = self.model(tokens_BT, use_cache=True, logits_to_keep=1).past_key_values
        return time.perf_counter() - started

    def _choose(self, key: tuple[str, int, int], num_rows: int, seconds: Callable[[], float]) -> str:
        """The fastest implementation for one shape of work, each run twice after a warm-up."""
        if not self.probe:
            return EXPERTS[0]
        if key in self._best:
            return self._best[key]
        times: dict[str, float] = {}
        for experts in EXPERTS:
            if experts != "batched_mm" or self._gathered_bytes(num_rows) <= BATCHED_LIMIT_BYTES:
                self._apply(experts)
                seconds()
                times[experts] = min(seconds() for _ in range(2))
        self._best[key] = min(times, key=lambda experts: times[experts])
        return self._best[key]

    def _apply(self, experts: str) -> None:
        self.model.set_experts_implementation(experts)
        self.settings = f"eager attention, experts {experts}"

    def _gathered_bytes(self, num_rows: int) -> int:
        config = self.model.config
        per_token = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok
        return num_rows * per_token * self.model.dtype.itemsize
