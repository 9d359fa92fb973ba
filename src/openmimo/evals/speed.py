"""Decoding speed with and without drafts, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from openmimo.engine import Completion, DraftStats, Engine, Prompt, SamplingParams
from openmimo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """Medians over `num_rounds` rounds; tokens per second are for all rows of the batch together.

    Units: decoding only, processing of the prompts is taken off. `identical`: both ways gave the same tokens.
    """

    plain_tokens_per_s: float
    draft_tokens_per_s: float
    acceptance_length: float
    identical: bool
    num_prompts: int
    num_tokens: int
    num_rounds: int

    @property
    def speedup(self) -> float:
        return self.draft_tokens_per_s / self.plain_tokens_per_s


def measure_draft_speed(
    engine: Engine, prompts: Sequence[Prompt], *, max_tokens: int = 64, num_rounds: int = 3
) -> SpeedReport:
    """Decode the prompts greedily, plain and drafted in turns, so that a slow spell of the machine hits both.

    Plain decoding feeds one token per step and runs no MTP heads. `identical` says whether both wrote the same.
    Raises: RequestError if the engine drafts with no heads, or there is nothing to measure.
    """
    if engine.draft_heads == 0 or num_rounds < 1 or max_tokens < 2 or not prompts:
        raise RequestError(
            f"draft_heads={engine.draft_heads}, num_rounds={num_rounds}, max_tokens={max_tokens} and "
            f"{len(prompts)} prompts; a speed comparison needs at least 1, 1, 2 and 1"
        )
    plain = engine.with_drafts(0)
    params = SamplingParams(max_tokens=max_tokens)
    plain_speeds: list[float] = []
    draft_speeds: list[float] = []
    _decode_speed(plain, prompts[:1], params)
    _decode_speed(engine, prompts[:1], params)
    plain_done: list[Completion] = []
    draft_done: list[Completion] = []
    for _ in range(num_rounds):
        plain_speed, plain_done = _decode_speed(plain, prompts, params)
        draft_speed, draft_done = _decode_speed(engine, prompts, params)
        plain_speeds.append(plain_speed)
        draft_speeds.append(draft_speed)
    return SpeedReport(
        plain_tokens_per_s=median(plain_speeds),
        draft_tokens_per_s=median(draft_speeds),
        acceptance_length=DraftStats.merge(completion.draft for completion in draft_done).acceptance_length,
        identical=[c.token_ids for c in plain_done] == [c.token_ids for c in draft_done],
        num_prompts=len(prompts),
        num_tokens=sum(len(completion.token_ids) for completion in plain_done),
        num_rounds=num_rounds,
    )


def _decode_speed(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> tuple[float, list[Completion]]:
    """Tokens per second after each prompt's first token."""
    started = time.perf_counter()
    engine.generate(prompts, SamplingParams(max_tokens=1))
    prefilled = time.perf_counter()
    completions = engine.generate(prompts, params)
    seconds = (time.perf_counter() - prefilled) - (prefilled - started)
    num_tokens = sum(len(completion.token_ids) - 1 for completion in completions)
    return num_tokens / max(seconds, 1e-9), completions
