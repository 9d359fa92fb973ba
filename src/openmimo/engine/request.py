"""What goes into the engine and what comes out: frozen records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from openmimo.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    `temperature` 0 is greedy decoding, with MTP drafts; above 0 tokens are sampled one at a time, without drafts.
    `top_k` 0 and `top_p` 1 keep the whole vocabulary. `stop_token_ids` come on top of the model's and the
    tokenizer's end tokens, which `ignore_eos` switches off. With `seed`, prompt i of a call draws from a stream of
    its own made of `seed + i`, whatever runs beside it. `logprobs` and `routed_experts` ask for those records.
    Raises: RequestError on values that make no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: bool = False
    routed_experts: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature={self.temperature} must be 0 (greedy) or a number above it")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")
        if self.top_k < 0:
            raise RequestError(f"top_k={self.top_k} must be 0 (keep all tokens) or more")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens={self.max_tokens} must be at least 1")
        if any(token < 0 for token in self.stop_token_ids):
            raise RequestError(f"stop_token_ids={self.stop_token_ids} must be token ids of 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt with its options; `index` is its place in the call, from 0."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    index: int = 0


@dataclass(frozen=True)
class DraftStats:
    """What verification made of the drafts: `histogram[n]` steps emitted n + 1 tokens, n of them drafts.

    The prompt's own forward pass, which gives the first token, is not a step. Tokens after a stop token do not
    count; a step that `max_tokens` cut short counts in full. Plain decoding has `histogram == (num_steps,)`.
    """

    histogram: tuple[int, ...] = ()

    @property
    def num_steps(self) -> int:
        return sum(self.histogram)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per step, 1 to 1 + heads; 1.0 when there was no step."""
        return 1.0 + sum(self.per_head)

    @property
    def per_head(self) -> tuple[float, ...]:
        """For each head, the share of steps in which its draft was kept."""
        steps = max(1, self.num_steps)
        return tuple(sum(self.histogram[head + 1 :]) / steps for head in range(len(self.histogram) - 1))

    @staticmethod
    def merge(stats: Iterable[DraftStats]) -> DraftStats:
        """The statistics of all steps together."""
        histograms = [each.histogram for each in stats]
        length = max(map(len, histograms), default=0)
        return DraftStats(tuple(sum(h[i] for h in histograms if i < len(h)) for i in range(length)))


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The continuation of one prompt.

    `token_ids` ends with the stop token when there was one; `text` leaves it out (and is "" without a tokenizer).
    `logprobs`, one per token, are those of the distribution that was sampled from (temperature, top-k and top-p
    applied); for greedy decoding those of the model at temperature 1.
    `routed_experts` has shape (prompt + completion - 1, sparse layers, k): row i is what token i of the prompt and
    completion chose; the last token was never fed, so it has none. Every row is valid.
    `finish_reason` is "stop" (a stop token) or "length" (`max_tokens` or the model's last position).
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None = None
    routed_experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None
    draft: DraftStats = field(default_factory=DraftStats)


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """The tokens of one step: `pieces[i]` is the text that token i completed, `drafted[i]` the head that proposed it.

    A piece is "" while a character is incomplete. `drafted[i]` is None for tokens the main model chose itself.
    `completion` is set on the last event only.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    drafted: tuple[int | None, ...]
    completion: Completion | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)
