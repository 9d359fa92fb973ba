"""Which sequences take part in a step, and with how many tokens.

Answers in progress come first, with their drafts; what is left of the step's tokens goes to prompts, in chunks. A
sequence that finds no free page takes one from the prefix cache, then goes without drafts, then stops the youngest
sequence, which is computed again later.
"""

from __future__ import annotations

from collections import deque

from openmimo.engine.blocks import BlockManager
from openmimo.engine.prefix import PrefixCache, PrefixEntry
from openmimo.engine.runner import PAGE_TOKENS, Runner
from openmimo.engine.sequence import Sequence

# Tokens per step of a prompt whose own probabilities are wanted: each has a row of logits, as long as the vocabulary.
SCORED_TOKENS = 128


class Scheduler:
    """Waiting and running sequences, oldest first. `scheduled` and `counts` are the plan of the current step.

    A prompt's chunk ends at its last multiple of `snapshot_tokens`, where the prefix cache can take a copy.
    """

    def __init__(
        self,
        runner: Runner,
        blocks: BlockManager,
        prefix: PrefixCache | None,
        *,
        max_batch: int,
        chunk_tokens: int,
        snapshot_tokens: int,
    ) -> None:
        self.runner, self.blocks, self.prefix = runner, blocks, prefix
        self.max_batch = min(max_batch, blocks.num_rows, runner.max_step_tokens)
        self.step_tokens = runner.max_step_tokens
        self.chunk_tokens = chunk_tokens
        self.snapshot_tokens = snapshot_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.scheduled: list[Sequence] = []
        self.counts: list[int] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def plan(self) -> None:
        """Choose the tokens of the next step."""
        self.scheduled, self.counts = [], []
        spare = self.step_tokens - len(self.running)
        prompts = False
        for sequence in tuple(self.running):
            if len(sequence.ids) - sequence.num_cached > 1:
                prompts = True
            elif sequence.row >= 0:
                spare -= self._plan_answer(sequence, spare)
        if prompts:
            chunk = self.chunk_tokens
            for sequence in tuple(self.running):
                if sequence.row >= 0 and len(sequence.ids) - sequence.num_cached > 1:
                    used = self._plan_prompt(sequence, min(chunk, spare + 1))
                    spare, chunk = spare - max(used - 1, 0), chunk - used

    def admit(self) -> list[tuple[Sequence, PrefixEntry]]:
        """Move waiting sequences to the running ones while there is room.

        Returns those that have nothing to feed before their next token is drawn, because an entry knows its logits.
        """
        ready: list[tuple[Sequence, PrefixEntry]] = []
        if not self.waiting:
            return ready
        # Pages that running prompts have yet to take.
        promised = sum(s.table.pages_missing(len(s.ids) + 1) for s in self.running if len(s.ids) - s.num_cached > 1)
        while self.waiting and len(self.running) < self.max_batch and self.blocks.free_rows:
            sequence = self.waiting[0]
            entry = sequence.entry or self._find(sequence)
            held = 0 if entry is None else len(entry.pages)
            copied = entry is not None and entry.length % PAGE_TOKENS > 0
            needed = max(0, -(-(len(sequence.ids) + 1) // PAGE_TOKENS) - held) + copied
            if entry is not None:
                sequence.table.adopt(entry.pages)  # eviction must not free them
            if not self._could_free(promised + needed) or not self._make_room(promised + needed):
                sequence.table.release()
                if not self.running and not ready:
                    self.forget_texts()  # alone, without any entry, it fits
                    continue
                break
            promised += needed
            self.waiting.popleft()
            self._start(sequence, entry)
            self.unpin(sequence)
            if entry is not None and entry.length == len(sequence.ids):
                ready.append((sequence, entry))
        return ready

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._give_back(sequence)
        else:
            self.waiting.remove(sequence)
        self.unpin(sequence)

    def unpin(self, sequence: Sequence) -> None:
        """Let go of the entry that a waiting sequence would start from."""
        if sequence.entry is not None:
            self.blocks.give_pages(sequence.entry.pages)
            sequence.entry = None

    def forget_texts(self) -> None:
        """Drop the prefix cache, and let waiting answers start from their first token."""
        if self.prefix is not None:
            self.prefix.clear()
        for sequence in self.waiting:
            self.unpin(sequence)

    def _find(self, sequence: Sequence) -> PrefixEntry | None:
        if self.prefix is None or sequence.params.prompt_logprobs:
            return None
        # An answer that is computed again has its first token drawn already.
        return self.prefix.find(sequence.ids, needs_heads=sequence.draft_limit > 0)

    def _start(self, sequence: Sequence, entry: PrefixEntry | None) -> None:
        sequence.row = self.blocks.take_row()
        sequence.head_start = 0
        self.running.append(sequence)
        if entry is None:
            return
        self.runner.write_row(sequence.row, entry.state)
        sequence.num_cached = entry.length
        if sequence.num_answered == 0:
            sequence.num_reused = entry.length
        # Its last answer may have ended before the heads saw these positions' true next ids.
        sequence.head_start = max(0, entry.length - 2 * self.runner.config.num_mtp_heads)
        sequence.record_routes(0, entry.routes)

    def _plan_answer(self, sequence: Sequence, spare: int) -> int:
        """Feed the newest token and the drafts that fit; returns how many drafts."""
        room = min(spare, sequence.limit - len(sequence.ids) - 1, sequence.num_drafts, len(sequence.drafts))
        num_drafts = max(room, 0)
        start = sequence.num_cached
        if start + num_drafts >= sequence.table.count * PAGE_TOKENS or sequence.table.is_shared(start):
            if num_drafts and not self._reserve(sequence, 1 + num_drafts, stop_others=False):
                num_drafts = 0
            if not num_drafts and not self._reserve(sequence, 1, stop_others=True):
                return 0
        self.scheduled.append(sequence)
        self.counts.append(1 + num_drafts)
        return num_drafts

    def _plan_prompt(self, sequence: Sequence, room: int) -> int:
        """Feed a chunk of the ids that the cache lacks; returns how many."""
        if sequence.params.prompt_logprobs:
            room = min(room, SCORED_TOKENS)
        start, end = sequence.num_cached, min(len(sequence.ids), sequence.num_cached + room)
        if self.prefix is not None:
            boundary = (min(end, len(sequence.ids) - 1)) // self.snapshot_tokens * self.snapshot_tokens
            end = boundary if boundary > start else end
        if end <= start or not self._reserve(sequence, end - start, stop_others=True):
            return 0
        self.scheduled.append(sequence)
        self.counts.append(end - start)
        return end - start

    def _reserve(self, sequence: Sequence, num_tokens: int, *, stop_others: bool) -> bool:
        """Make the places for the next tokens this sequence's own; False if it has to wait or was stopped itself."""
        table, start = sequence.table, sequence.num_cached
        # Evicting can also end the sharing, so what is needed is counted anew.
        while table.pages_missing(start + num_tokens) + table.is_shared(start) > len(self.blocks.free_pages):
            if self.prefix is not None and self.prefix.evict():
                continue
            if not stop_others or not self._stop_youngest(sequence) or sequence.row < 0:
                return False
        if table.is_shared(start):
            table.make_own(start, self.runner.copy_page)
        grown = table.grow(start + num_tokens)
        assert grown
        return True

    def _make_room(self, num_pages: int) -> bool:
        """Evict from the prefix cache until that many pages are free."""
        while len(self.blocks.free_pages) < num_pages:
            if self.prefix is None or not self.prefix.evict():
                return False
        return True

    def _could_free(self, num_pages: int) -> bool:
        """Whether evicting all of the prefix cache would free enough: if not, it stays."""
        missing = num_pages - len(self.blocks.free_pages)
        return missing <= 0 or (self.prefix is not None and missing <= self.prefix.num_evictable_pages())

    def _stop_youngest(self, asking: Sequence) -> bool:
        """Free pages: of the youngest running sequence, or what waiting choices would start from."""
        youngest = self.running[-1]
        if youngest is asking and len(self.running) == 1:
            assert any(sequence.entry for sequence in self.waiting), "a sequence that is alone has all pages"
            self.forget_texts()
            return True
        self.running.pop()
        self._give_back(youngest)
        self.waiting.appendleft(youngest)
        self.num_preemptions += 1
        if youngest in self.scheduled:
            place = self.scheduled.index(youngest)
            del self.scheduled[place], self.counts[place]
        return True

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.give_row(sequence.row)
        sequence.table.release()
        sequence.row, sequence.num_cached, sequence.drafts = -1, 0, []
