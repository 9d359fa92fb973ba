"""The engine's loop: plan a step, run it, choose tokens, keep what was right, draft again.

Speculation: every position's token is drawn with the random number of that position (or is the most probable one), and
a draft is kept if it equals the drawn token. What is written is therefore the same with and without drafts.

Suffixes as in `runner.py`.
"""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

import numpy as np

from openmimo.engine.blocks import BlockManager
from openmimo.engine.drafting import REST, DraftPolicy
from openmimo.engine.prefix import MIN_CACHED_TOKENS, PrefixCache, PrefixEntry
from openmimo.engine.runner import PAGE_TOKENS, Float32, Int32, Routes, Runner, StepInput
from openmimo.engine.sampler import BROKEN, Choices, RowOptions, choose, greedy, score
from openmimo.engine.scheduler import Scheduler
from openmimo.engine.sequence import Sequence


class Emission(NamedTuple):
    """A step gave a sequence `num_tokens` ids, up to place `end`; the first `num_drafted` of them were drafts.

    `rejected` are the drafts that came after these and were not kept.
    """

    sequence: Sequence
    end: int
    num_tokens: int
    num_drafted: int
    rejected: tuple[int, ...] = ()


class _Span(NamedTuple):
    """The rows of logits of one sequence: after its newest fed token and after each of its drafts."""

    sequence: Sequence
    row: int
    num_rows: int


class _Scored(NamedTuple):
    """Rows of logits, from `row` on, that tell how probable the prompt's tokens from `start` + 1 on were."""

    sequence: Sequence
    start: int
    row: int
    num_rows: int


class _Chunk(NamedTuple):
    """Prompt tokens that a step feeds; `row` is the place of their last logits, -1 for none."""

    sequence: Sequence
    start: int
    num_tokens: int
    row: int


class EngineCore:
    """One runner, its rows and pages, and all sequences on them.

    `num_tokens` is how many vocabulary rows stand for a token; the rows behind are never chosen.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch: int,
        num_tokens: int,
        chunk_tokens: int,
        snapshot_tokens: int,
        prefix_cache_bytes: int,
    ) -> None:
        self.runner = runner
        self.num_tokens = num_tokens
        self.snapshot_tokens = snapshot_tokens
        self.num_heads = runner.config.num_mtp_heads
        self.blocks = BlockManager(
            num_rows=runner.num_rows,
            num_pages=runner.num_pages,
            row_bytes=runner.row_bytes,
            page_bytes=runner.page_bytes,
        )
        self.prefix = PrefixCache(self.blocks, limit_bytes=prefix_cache_bytes) if prefix_cache_bytes else None
        self.scheduler = Scheduler(
            runner,
            self.blocks,
            self.prefix,
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            snapshot_tokens=snapshot_tokens,
        )
        self.policy = DraftPolicy(self.num_heads)
        # Buffers of a step, made once.
        size, rows = runner.max_step_tokens, runner.num_rows
        self._token_ids_N, self._logits_M = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._places_N = np.arange(size, dtype=np.int32)
        self._rows_S, self._starts_S = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._counts_S, self._kept_S = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self._window_SW = np.zeros((rows, 2 * self.num_heads), np.int32)
        self._choices: Choices | None = None
        self._choice_rows: dict[int, int] = {}

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the answers to one prompt; all but the first start from the first one's prompt."""
        first, *siblings = sequences
        first.siblings = siblings
        self.scheduler.waiting.append(first)

    def abort(self, sequences: list[Sequence]) -> None:
        """Take the answers to one prompt out, finished or not."""
        first = sequences[0]
        for sequence in sequences:
            if sequence.finish_reason is None and sequence not in first.siblings:
                self.scheduler.release(sequence)
        first.siblings = []

    def step(self) -> list[Emission]:
        """Run one step; what it gave, in the order of the sequences' admission."""
        began = perf_counter()
        emissions: list[Emission] = []
        scheduler = self.scheduler
        changed = False  # whether the answers in progress are others than in the last step
        ready = scheduler.admit()
        if ready:
            self._begin_from_entries(ready, emissions)
        scheduler.plan()
        scheduled = scheduler.scheduled
        if scheduled:
            step, spans, chunks, scored = self._make_step()
            output = self.runner.forward(step)
            for part in scored:
                self._score_prompt(part, output.logits_MV)
            tokens = self._choose(output.logits_MV, spans)
            num_tokens = len(step.token_ids_N)
            self._advance(tokens, output.routed_experts_NLk, (perf_counter() - began) / num_tokens, emissions)
            if chunks:
                self._prefill_heads(chunks)
            self.runner.commit(step.rows_S, self._kept_S[: len(scheduled)])
            changed = bool(chunks)
            if chunks:
                self._take_snapshots(chunks, output.logits_MV)
            elif not ready:
                self.policy.observe_step(num_tokens, perf_counter() - began)
        for sequence, *_ in emissions:
            if sequence.finish_reason is not None and sequence.row >= 0:
                self._finish(sequence)
                changed = True
        if changed or ready or not self.policy.rests():
            self._draft()
        return emissions

    def _make_step(self) -> tuple[StepInput, list[_Span], list[_Chunk], list[_Scored]]:
        """The planned tokens as flat arrays, whose logits are wanted, and which of it is prompt."""
        token_ids_N, rows_S, starts_S, counts_S = self._token_ids_N, self._rows_S, self._starts_S, self._counts_S
        scheduled, counts = self.scheduler.scheduled, self.scheduler.counts
        spans: list[_Span] = []
        chunks: list[_Chunk] = []
        scored: list[_Scored] = []
        offset = num_wanted = 0
        for place, sequence in enumerate(scheduled):
            count, start, ids = counts[place], sequence.num_cached, sequence.ids
            end, wanted = offset + count, count
            if start + 1 == len(ids):
                token_ids_N[offset] = ids[-1]
                if count > 1:
                    token_ids_N[offset + 1 : end] = sequence.drafts[: count - 1]
            else:
                token_ids_N[offset:end] = ids[start : start + count]
                wanted = int(start + count == len(ids))
                if extra := _scored_rows(sequence, start, count):
                    self._logits_M[num_wanted : num_wanted + extra] = self._places_N[offset : offset + extra]
                    scored.append(_Scored(sequence, start, num_wanted, extra))
                    num_wanted += extra
            if start < sequence.num_prompt or start + 1 < len(ids):
                chunks.append(_Chunk(sequence, start, count, num_wanted if wanted else -1))
            if wanted:
                self._logits_M[num_wanted : num_wanted + wanted] = self._places_N[end - wanted : end]
                spans.append(_Span(sequence, num_wanted, wanted))
                num_wanted += wanted
            rows_S[place], starts_S[place], counts_S[place] = sequence.row, start, count
            offset = end
        size = len(scheduled)
        step = StepInput(
            token_ids_N=token_ids_N[:offset],
            rows_S=rows_S[:size],
            starts_S=starts_S[:size],
            counts_S=counts_S[:size],
            page_tables=tuple([sequence.table.ids for sequence in scheduled]),
            logits_M=self._logits_M[:num_wanted],
        )
        return step, spans, chunks, scored

    def _score_prompt(self, part: _Scored, logits_MV: Float32) -> None:
        """Record how probable a prompt's tokens were; what is known from before a preemption stays."""
        sequence, start, row, num_rows = part
        known, end = len(sequence.prompt_logprobs), start + num_rows
        if end > known:
            rows = logits_MV[row + known - start : row + num_rows, : self.num_tokens]
            found, best = score(rows, sequence.ids[known + 1 : end + 1], sequence.params.top_logprobs)
            sequence.prompt_logprobs += found
            sequence.prompt_top_logprobs += best

    def _choose(self, logits_MV: Float32, spans: list[_Span]) -> list[int]:
        """A token for every row of logits: the most probable one, or one drawn as the sequence's options say."""
        logits_MV = logits_MV[:, : self.num_tokens]
        special = [span for span in spans if not span.sequence.is_plain]
        if not special:
            return greedy(logits_MV)
        if any(sequence.adjuster is not None or sequence.constraint is not None for sequence, _, _ in special):
            logits_MV = logits_MV.copy()  # snapshots keep what the model gave
        for sequence, row, count in special:
            for change in (sequence.adjuster, sequence.constraint):
                if change is not None:
                    change.apply_window(logits_MV[row : row + count], sequence.drafts[: count - 1])
        tokens = greedy(logits_MV)
        self._draw(logits_MV, special, tokens)
        return tokens

    def _draw(self, logits_MV: Float32, spans: list[_Span], tokens: list[int]) -> None:
        """Replace the tokens of sequences with options by drawn ones, and keep the distributions for the records."""
        options = RowOptions.make([(s.params, s.random_state, len(s.ids), num_rows) for s, _, num_rows in spans])
        rows = [row for span in spans for row in range(span.row, span.row + span.num_rows)]
        if BROKEN in tokens:
            logits_MV = np.where(np.equal(tokens, BROKEN)[:, None], np.float32(0), logits_MV)
        self._choices = choose(logits_MV[rows] if len(rows) < len(logits_MV) else logits_MV, options)
        for row, token in zip(rows, self._choices.tokens_M.tolist(), strict=True):
            if tokens[row] != BROKEN:
                tokens[row] = token
        first = 0
        for span in spans:
            self._choice_rows[id(span.sequence)] = first
            first += span.num_rows

    def _advance(
        self, tokens: list[int], routes_NLk: Routes, seconds_per_token: float, emissions: list[Emission]
    ) -> None:
        """Give every sequence its tokens: the drafts up to the first wrong one, and the token drawn there."""
        counts, kept_S = self.scheduler.counts, self._kept_S
        has_routes = routes_NLk.size > 0
        row = offset = 0
        for place, sequence in enumerate(self.scheduler.scheduled):
            count, start = counts[place], sequence.num_cached
            kept = count
            missing = len(sequence.ids) - start
            if missing > 1:
                row += _scored_rows(sequence, start, count)
            if missing == 1:
                drafts, kept = sequence.drafts, 1
                while kept < count and drafts[kept - 1] == tokens[row + kept - 1]:
                    kept += 1
                taken = self._take(sequence, tokens[row : row + kept])
                if sequence.num_answered > taken > 0:
                    self._count_step(sequence, count - 1, taken, kept, seconds_per_token)
                rejected = tuple(drafts[kept - 1 : count - 1]) if taken == kept else ()
                emissions.append(Emission(sequence, len(sequence.ids), taken, min(taken, kept - 1), rejected))
                row += count
                kept = max(taken, 1)  # what was fed, even if no token follows
            elif missing == count:
                taken = self._take(sequence, tokens[row : row + 1])
                emissions.append(Emission(sequence, len(sequence.ids), taken, 0))
                row += 1
            if has_routes:
                sequence.record_routes(start, routes_NLk[offset : offset + kept])
            sequence.num_cached = start + kept
            kept_S[place] = kept
            offset += count

    def _take(self, sequence: Sequence, tokens: list[int]) -> int:
        """Append tokens and their records; returns how many counted. The first that is none ends the answer."""
        if BROKEN in tokens:
            taken = sequence.append(tokens[: tokens.index(BROKEN)])
            sequence.finish_reason = sequence.finish_reason or "error"
        else:
            taken = sequence.append(tokens)
        params = sequence.params
        if params.logprobs or params.top_logprobs:
            assert self._choices is not None
            first = self._choice_rows[id(sequence)]
            if params.logprobs:
                sequence.logprobs += self._choices.logprobs(first, taken)
            if params.top_logprobs:
                rows = range(first, first + taken)
                sequence.top_logprobs += [self._choices.top_logprobs(r, params.top_logprobs) for r in rows]
        return taken

    def _count_step(self, sequence: Sequence, num_drafts: int, taken: int, kept: int, seconds_per_token: float) -> None:
        sequence.histogram[taken - 1] += 1
        sequence.verify_seconds += seconds_per_token * (1 + num_drafts)
        if num_drafts:
            for head in range(num_drafts):
                sequence.proposed[head] += 1
            sequence.tokens_since_draft = 0
            if sequence.adaptive:
                self.policy.learn(sequence, num_drafts, kept - 1)
        else:
            sequence.tokens_since_draft += taken

    def _begin_from_entries(self, ready: list[tuple[Sequence, PrefixEntry]], emissions: list[Emission]) -> None:
        """First tokens of sequences whose whole text is known: drawn from the logits that were kept."""
        for sequence, entry in ready:
            assert entry.logits_V is not None
            tokens = self._choose(entry.logits_V[None].copy(), [_Span(sequence, 0, 1)])
            taken = self._take(sequence, tokens)
            emissions.append(Emission(sequence, len(sequence.ids), taken, 0))
            if sequence.siblings:
                self._start_siblings(sequence, entry)
            if sequence.finish_reason is not None:
                self._finish(sequence)

    def _prefill_heads(self, chunks: list[_Chunk]) -> None:
        """Run the heads over the prompts' chunks, as far as the next ids are known."""
        rows: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        next_ids: list[Int32] = []
        for sequence, start, count, _ in chunks:
            if sequence.draft_limit == 0:
                continue
            end, known = start + count, sequence.ids
            rows.append(sequence.row)
            starts.append(sequence.head_start)
            counts.append(end - sequence.head_start)
            next_ids.append(np.array(known[sequence.head_start + 1 : end + self.num_heads], dtype=np.int32))
            # The last positions lack their next ids at the prompt's end: drafting runs over them.
            sequence.head_start = max(0, min(end, len(known) - self.num_heads))
        if rows:
            self.runner.prefill_heads(_int32(rows), _int32(starts), _int32(counts), tuple(next_ids))

    def _take_snapshots(self, chunks: list[_Chunk], logits_MV: Float32) -> None:
        """Let others take up the texts that end here: other choices of the same request, and later requests."""
        for sequence, start, count, row in chunks:
            end = start + count
            if end == sequence.num_prompt and sequence.siblings:
                self._start_siblings(sequence, self._entry(sequence, end, logits_MV[row].copy()))
            elif end == sequence.num_prompt or end % self.snapshot_tokens == 0:
                self._remember(sequence, end, logits_MV[row] if row >= 0 else None)

    def _start_siblings(self, sequence: Sequence, entry: PrefixEntry) -> None:
        """Queue a request's other choices, each with a hold on the state after the prompt."""
        for sibling in reversed(sequence.siblings):
            sibling.entry = entry
            self.blocks.share_pages(entry.pages)
            self.scheduler.waiting.appendleft(sibling)
        sequence.siblings = []

    def _remember(self, sequence: Sequence, length: int, logits_V: Float32 | None) -> None:
        if self.prefix is None or length < MIN_CACHED_TOKENS:
            return
        ids, heads = sequence.ids[:length], sequence.draft_limit > 0
        if not self.prefix.has(ids, needs_heads=heads, needs_logits=logits_V is not None):
            self.prefix.add(ids, self._entry(sequence, length, None if logits_V is None else logits_V.copy()))

    def _entry(self, sequence: Sequence, length: int, logits_V: Float32 | None) -> PrefixEntry:
        """The state after the `length` tokens that the sequence's cache holds right now."""
        assert sequence.num_cached == length
        return PrefixEntry(
            length=length,
            pages=tuple(sequence.table.pages[: -(-length // PAGE_TOKENS)]),
            state=self.runner.read_row(sequence.row),
            routes=sequence.routes[:length].copy(),
            logits_V=logits_V,
            has_heads=sequence.draft_limit > 0,
        )

    def _finish(self, sequence: Sequence) -> None:
        if sequence.finish_reason != "error":
            self._remember(sequence, sequence.num_cached, None)
        self.scheduler.release(sequence)

    def _draft(self) -> None:
        """Let the heads propose what follows the newest token of every answer that wants drafts."""
        adaptive: list[Sequence] = []
        others: list[Sequence] = []
        num_answers = 0
        for sequence in self.scheduler.running:
            if len(sequence.ids) - sequence.num_cached != 1 or sequence.num_answered == 0:
                continue  # still in its prompt, whose end others may have to take up
            num_answers += 1
            if sequence.draft_limit and sequence.limit - len(sequence.ids) > 1:
                (adaptive if sequence.adaptive else others).append(sequence)
        self.policy.rest = 0
        if adaptive:
            num_others = num_answers - len(adaptive) + sum(sequence.num_drafts for sequence in others)
            self.policy.choose(adaptive, num_others)
            for sequence in adaptive:
                if sequence.num_drafts:
                    others.append(sequence)
                else:
                    sequence.drafts = []
        if others:
            self.policy.rest = 0
        elif not adaptive:
            self.policy.rest = REST
        width = 2 * self.num_heads
        most = max(1, self.runner.max_step_tokens // max(1, width))
        for first in range(0, len(others), most):
            self._draft_some(others[first : first + most], width)

    def _draft_some(self, sequences: list[Sequence], width: int) -> None:
        began = perf_counter()
        window_SW, size = self._window_SW, len(sequences)
        for place, sequence in enumerate(sequences):
            last = sequence.ids[-width:]
            window_SW[place, width - len(last) :] = last
            if len(last) < width:
                window_SW[place, : width - len(last)] = 0
            self._rows_S[place], self._starts_S[place] = sequence.row, sequence.num_cached
        drafts = self.runner.draft(self._rows_S[:size], self._starts_S[:size], window_SW[:size]).tolist()
        seconds = perf_counter() - began
        self.policy.draft_cost.observe(size, seconds)
        for sequence, proposals in zip(sequences, drafts, strict=True):
            sequence.drafts = proposals
            sequence.draft_seconds += seconds / size


def _scored_rows(sequence: Sequence, start: int, count: int) -> int:
    """How many of these prompt tokens need logits only because the prompt's own probabilities were asked for."""
    if not sequence.params.prompt_logprobs:
        return 0
    return max(0, min(start + count, sequence.num_prompt - 1) - start)


def _int32(values: list[int]) -> Int32:
    return np.array(values, dtype=np.int32)
