"""What goes into the engine and what comes out: frozen records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from openmimo.errors import RequestError

NO_BIAS: Mapping[int, float] = {}


class ConstraintState(Protocol):
    """What one answer may go on with. Answers under the same constraint have states of their own."""

    def apply_window(self, logits_TV: npt.NDArray[np.float32], drafts: list[int]) -> None:
        """Set the logits of what may not follow to minus infinity, in place. Row t assumes the first t drafts."""
        ...

    def add(self, token: int) -> None:
        """The answer has one more token."""
        ...


class Constraint(Protocol):
    """A language that answers have to be in, such as `openmimo.engine.grammar.Grammar`."""

    def begin(self) -> ConstraintState:
        """The state of an answer without tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt.

    `temperature` 0 is greedy decoding. Above 0, a token is drawn from what is left of the distribution after, in this
    order: penalties and `logit_bias`, temperature, `top_k` (0 keeps all), `top_p` (1 keeps all; the token that crosses
    it is kept) and `min_p` (tokens at least that share of the most probable one). `repetition_penalty` counts prompt
    and answer, `presence_penalty` and `frequency_penalty` the answer alone.
    `stop_token_ids` come on top of the model's and the tokenizer's end tokens, which `ignore_eos` switches off; `stop`
    are texts that end the answer. `n` answers are written to every prompt. With `seed`, prompt i of a call draws from
    a stream of its own made of `seed + i`: the number for a token depends on that, the answer and the token's position
    alone, whatever runs beside it and whether or not it was drafted.
    `logprobs` and `routed_experts` ask for those records, `top_logprobs` for that many alternatives to each token,
    `prompt_logprobs` for the same of the prompt's tokens, which are then all computed, prefix cache or not.
    `constraint` lets only tokens through that keep the answer in its language; it comes before all other options.
    Raises: RequestError on values that make no sense.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: NO_BIAS)
    max_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    routed_experts: bool = False
    prompt_logprobs: bool = False
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _demand("temperature", self.temperature, 0.0 <= self.temperature < math.inf, "0 (greedy) or a number above it")
        _demand("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1 (1 keeps all tokens)")
        _demand("top_k", self.top_k, self.top_k >= 0, "0 (keep all tokens) or more")
        _demand("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "from 0 (keep all tokens) to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _demand(name, getattr(self, name), math.isfinite(getattr(self, name)), "a finite number (0 is none)")
        penalty = self.repetition_penalty
        _demand("repetition_penalty", penalty, 1e-3 <= penalty <= 1e3, "0.001 to 1000 (1 is none)")
        finite = all(math.isfinite(bias) for bias in self.logit_bias.values())
        _demand("logit_bias", dict(self.logit_bias), finite, "finite numbers by token id")
        _demand("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _demand("n", self.n, self.n >= 1, "at least 1")
        _demand("top_logprobs", self.top_logprobs, self.top_logprobs >= 0, "0 or more")
        ids = (*self.stop_token_ids, *self.logit_bias)
        _demand("stop_token_ids or logit_bias", ids, all(token >= 0 for token in ids), "token ids of 0 or more")
        _demand("stop", self.stop, all(self.stop), "texts that are not empty")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class DraftStats:
    """What verification made of the drafts: `histogram[n]` steps emitted n + 1 tokens, n of them drafts.

    `proposed[head]` steps verified a draft of that head; empty means all steps did. The prompt's own forward passes,
    which give the first token, are not steps. Tokens after a stop token do not count; a step that `max_tokens` cut
    short counts in full. Plain decoding has `histogram == (num_steps,)`.
    `draft_seconds` and `verify_seconds` are the answer's share, by tokens, of the time of head passes and of all else.
    """

    histogram: tuple[int, ...] = ()
    proposed: tuple[int, ...] = field(default=(), compare=False)
    draft_seconds: float = field(default=0.0, compare=False)
    verify_seconds: float = field(default=0.0, compare=False)

    @property
    def num_steps(self) -> int:
        return sum(self.histogram)

    @property
    def num_accepted(self) -> int:
        """Drafts that were kept."""
        return sum(count * number for number, count in enumerate(self.histogram))

    @property
    def num_proposed(self) -> int:
        """Drafts that were verified."""
        return sum(self._steps_by_head())

    @property
    def num_drafting_steps(self) -> int:
        """Steps that verified at least one draft."""
        return max(self._steps_by_head(), default=0)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per step, 1 to 1 + heads; 1.0 when there was no step."""
        return 1.0 + self.num_accepted / max(1, self.num_steps)

    @property
    def per_head(self) -> tuple[float, ...]:
        """For each head, the share of the steps with its draft in which the draft was kept."""
        proposed = self._steps_by_head()
        return tuple(sum(self.histogram[head + 1 :]) / max(1, steps) for head, steps in enumerate(proposed))

    def _steps_by_head(self) -> tuple[int, ...]:
        return self.proposed or (self.num_steps,) * (len(self.histogram) - 1)

    @staticmethod
    def merge(stats: Iterable[DraftStats]) -> DraftStats:
        """The statistics of all steps together."""
        parts = list(stats)
        return DraftStats(
            histogram=_added([each.histogram for each in parts]),
            proposed=_added([each._steps_by_head() for each in parts]),
            draft_seconds=sum(each.draft_seconds for each in parts),
            verify_seconds=sum(each.verify_seconds for each in parts),
        )


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer to one prompt; `choice` counts the answers to the same prompt from 0.

    `token_ids` ends with the stop token when there was one; `text` leaves it out, and a stop text and what follows it
    (and is "" without a tokenizer).
    `logprobs`, one per token, are those of the distribution that was drawn from, all options applied; for greedy
    decoding those at temperature 1, after penalties and bias. `top_logprobs` has the most probable tokens of that
    distribution for each token, best first.
    `prompt_logprobs` are those of the prompt's tokens but the first, at temperature 1 and without options, and
    `prompt_top_logprobs` the most probable ones in their places; of several choices only the first has them.
    `routed_experts` has shape (prompt + completion - 1, sparse layers, k): row i is what token i of the prompt and
    completion chose; the last token was never fed, so it has none. Every row is valid.
    `finish_reason` is "stop" (a stop token or text, which `stopped_by` holds), "length" (`max_tokens`, or no positions
    or pages left) or "error" (what the model gave after these tokens are no numbers, so none can follow).
    `num_cached_tokens` of the prompt came from the prefix cache or from another choice.
    `weights_versions` has a pair (place in the answer, version) for every version of the weights that tokens were drawn
    with, from that place on; one pair unless the weights changed meanwhile.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    stopped_by: int | str | None = None
    choice: int = 0
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top_logprobs: tuple[dict[int, float], ...] | None = None
    routed_experts: npt.NDArray[np.uint8 | np.uint16] | None = None
    draft: DraftStats = field(default_factory=DraftStats)
    num_cached_tokens: int = 0
    weights_versions: tuple[tuple[int, int], ...] = ((0, 0),)


@dataclass(frozen=True, kw_only=True)
class PartialAnswer:
    """An answer that is not finished: what `Engine.unfinished` gives and `Engine.add_request` goes on from.

    `routed_experts` has a row for every token of prompt and answer that was fed, or None if they were not asked for.
    """

    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    routed_experts: npt.NDArray[np.uint8 | np.uint16] | None = None
    weights_versions: tuple[tuple[int, int], ...] = ((0, 0),)


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """How busy an engine is.

    Answers that are written and that wait, preemptions so far, and bytes of the cache: rings of sliding layers and MTP
    heads, pages of global layers, what of both the prefix cache holds or has copied.
    """

    num_running: int
    num_waiting: int
    num_preemptions: int
    ring_bytes: int
    ring_bytes_total: int
    page_bytes: int
    page_bytes_total: int
    prefix_bytes: int


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """The tokens of one step: `pieces[i]` is the text that token i completed, `drafted[i]` the head that proposed it.

    A piece is "" while a character is incomplete or could still belong to a stop text. `drafted[i]` is None for tokens
    the main model chose itself. `rejected` are the drafts that followed and were not kept, of the heads after the last
    one in `drafted`. `logprobs` and `top_logprobs` are those of the tokens, if asked for.
    `completion` is set on the answer's last event only.
    """

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    drafted: tuple[int | None, ...]
    rejected: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None
    completion: Completion | None = None
    request_id: int = 0
    choice: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def _added(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The sum of tuples place by place, short ones filled with 0."""
    length = max(map(len, rows), default=0)
    return tuple(sum(row[place] for row in rows if place < len(row)) for place in range(length))


def _demand(name: str, value: object, fine: bool, expected: str) -> None:
    if not fine:
        raise RequestError(f"{name}={value} must be {expected}")
