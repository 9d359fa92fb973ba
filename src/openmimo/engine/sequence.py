"""One answer while it is being decoded."""

from __future__ import annotations

import numpy as np

from openmimo.engine.blocks import BlockManager, PageTable
from openmimo.engine.penalties import LogitAdjuster
from openmimo.engine.prefix import PrefixEntry
from openmimo.engine.request import Completion, DraftStats, PartialAnswer, SamplingParams
from openmimo.engine.runner import Routes
from openmimo.engine.text import AnswerText, TextCodec


class Sequence:
    """Prompt and answer so far, what of it the cache holds, and the answer's records.

    `ids` ends with the newest token, which is chosen but not fed; the cache holds the first `num_cached`. A sequence
    with more than one id missing from the cache is in its prompt (or is computed again after a preemption). `limit` is
    the most ids there may be; `stop_ids` end the answer. `drafts` are the proposals for the ids after the newest.
    `head_start` is the first position that the MTP heads have not run over with true ids (before the drafts do).
    """

    __slots__ = (
        "acceptance",
        "adaptive",
        "adjuster",
        "choice",
        "constraint",
        "draft_limit",
        "draft_seconds",
        "drafts",
        "entry",
        "finish_reason",
        "head_start",
        "histogram",
        "ids",
        "is_plain",
        "limit",
        "logprobs",
        "num_cached",
        "num_drafts",
        "num_prompt",
        "num_reused",
        "num_routed",
        "params",
        "prompt_logprobs",
        "prompt_top_logprobs",
        "proposed",
        "random_state",
        "request_id",
        "routes",
        "row",
        "siblings",
        "stop_ids",
        "table",
        "text",
        "tokens_since_draft",
        "top_logprobs",
        "verify_seconds",
        "weights_versions",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: list[int],
        *,
        blocks: BlockManager,
        request_id: int,
        choice: int,
        limit: int,
        stop_ids: frozenset[int],
        random_state: int,
        draft_limit: int,
        adaptive: bool,
        routes: Routes,
        codec: TextCodec | None,
    ) -> None:
        self.params = params
        self.ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.request_id, self.choice = request_id, choice
        self.limit, self.stop_ids = limit, stop_ids
        self.random_state = random_state
        self.table = PageTable(blocks)
        self.row = -1
        self.num_cached = 0
        self.num_reused = 0
        self.head_start = 0
        self.entry: PrefixEntry | None = None
        self.siblings: list[Sequence] = []
        self.text = AnswerText(codec, params.stop)
        adjusted = params.penalized or bool(params.logit_bias)
        self.adjuster = LogitAdjuster(params, self.ids) if adjusted else None
        self.constraint = None if params.constraint is None else params.constraint.begin()
        wants_records = params.logprobs or params.top_logprobs > 0
        self.is_plain = params.greedy and not adjusted and not wants_records and self.constraint is None
        self.draft_limit, self.adaptive = draft_limit, adaptive
        self.drafts: list[int] = []
        self.num_drafts = 0 if adaptive else draft_limit
        self.tokens_since_draft = 0
        self.acceptance: list[float] = []
        self.histogram = [0] * (draft_limit + 1)
        self.proposed = [0] * draft_limit
        self.draft_seconds = self.verify_seconds = 0.0
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.prompt_logprobs: list[float] = []
        self.prompt_top_logprobs: list[dict[int, float]] = []
        self.routes = routes
        self.num_routed = 0
        self.finish_reason: str | None = None
        self.weights_versions: list[tuple[int, int]] = [(0, 0)]

    @property
    def num_answered(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def token_ids(self) -> list[int]:
        """The answer so far."""
        return self.ids[self.num_prompt :]

    def append(self, tokens: list[int]) -> int:
        """Take chosen tokens until one ends the answer; returns how many were taken."""
        taken = 0
        for token in tokens:
            self.ids.append(token)
            taken += 1
            for follower in (self.adjuster, self.constraint):
                if follower is not None:
                    follower.add(token)
            if token in self.stop_ids or (self.text.watches and self.text.push(token)):
                self.finish_reason = "stop"
            elif len(self.ids) >= self.limit:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        return taken

    def note_version(self, version: int) -> None:
        """From the next token on, weights of this version draw."""
        if self.weights_versions[-1][0] == self.num_answered:
            self.weights_versions.pop()
        self.weights_versions.append((self.num_answered, version))

    def restore(self, part: PartialAnswer) -> None:
        """Take up an answer that was begun before: its tokens are computed again, what is recorded of them stays."""
        self.append(list(part.token_ids))
        self.logprobs += part.logprobs
        self.weights_versions = list(part.weights_versions)
        if part.routed_experts is not None:
            self.record_routes(0, part.routed_experts)

    def partial(self) -> PartialAnswer:
        """The answer so far, for `restore`."""
        return PartialAnswer(
            choice=self.choice,
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            routed_experts=self.routes[: self.num_routed].copy() if self.params.routed_experts else None,
            weights_versions=tuple(self.weights_versions),
        )

    def record_routes(self, start: int, routes_TLk: Routes) -> None:
        """Keep the experts of the tokens from position `start` on; what is known already stays."""
        end = start + len(routes_TLk)
        if end > len(self.routes):
            spare = np.zeros((max(end - len(self.routes), len(self.routes)), *routes_TLk.shape[1:]), routes_TLk.dtype)
            self.routes = np.concatenate((self.routes, spare))
        if end > self.num_routed:
            self.routes[self.num_routed : end] = routes_TLk[self.num_routed - start :]
            self.num_routed = end

    def complete(self) -> Completion:
        """The finished record."""
        assert self.finish_reason is not None
        params = self.params
        routes = self.routes[: len(self.ids) - 1].copy() if params.routed_experts else None
        ended_by_token = self.finish_reason == "stop" and self.ids[-1] in self.stop_ids
        return Completion(
            token_ids=tuple(self.token_ids),
            text=self.text.final(self.token_ids[:-1] if ended_by_token else self.token_ids),
            finish_reason=self.finish_reason,
            stopped_by=self.ids[-1] if ended_by_token else self.text.stopped_by,
            choice=self.choice,
            logprobs=tuple(self.logprobs) if params.logprobs else None,
            top_logprobs=tuple(self.top_logprobs) if params.top_logprobs else None,
            prompt_logprobs=tuple(self.prompt_logprobs) if params.prompt_logprobs else None,
            prompt_top_logprobs=tuple(self.prompt_top_logprobs) if params.prompt_logprobs else None,
            routed_experts=routes,
            draft=DraftStats(tuple(self.histogram), tuple(self.proposed), self.draft_seconds, self.verify_seconds),
            num_cached_tokens=self.num_reused,
            weights_versions=tuple(self.weights_versions),
        )
