"""The engine as a state machine: any order of requests, steps and aborts, every page and row accounted for."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from openmimo.engine import Completion, Engine, SamplingParams
from openmimo.engine.sampler import RowOptions, choose, random_state

sys.path.append(str(Path(__file__).parents[1] / "unit" / "engine"))
from fake_runner import FakeRunner, next_logits, plain_routes

TEXT = np.random.default_rng(9).integers(0, 23, 400).tolist()
# More examples than a run of all tests has time for: OPENMIMO_MACHINE_EXAMPLES=700 takes 10^5 steps.
EXAMPLES = int(os.environ.get("OPENMIMO_MACHINE_EXAMPLES", "60"))


def oracle(prompt: list[int], params: SamplingParams, choice: int, num_tokens: int) -> tuple[int, ...]:
    """The answer by plain hashes and one draw at a time, no cache and no batch."""
    ids = list(prompt)
    for _ in range(num_tokens):
        row = (params, random_state(params.seed or 0, choice), len(ids), 1)
        ids.append(int(choose(next_logits(ids)[None], RowOptions.make([row])).tokens_M[0]))
    return tuple(ids[len(prompt) :])


class EngineMachine(RuleBasedStateMachine):
    """Catches leaks, overlaps, wrong counts of bytes and any text or route that depends on what else happened."""

    @initialize(
        rows=st.integers(1, 5),
        pages=st.integers(3, 14),
        step_tokens=st.integers(5, 80),
        heads=st.sampled_from([0, 1, 3, "auto"]),
        cache_bytes=st.sampled_from([0, 6000, 1 << 20]),
    )
    def build(self, rows: int, pages: int, step_tokens: int, heads: int | str, cache_bytes: int) -> None:
        self.runner = FakeRunner(
            num_rows=rows, num_pages=pages, max_step_tokens=step_tokens, checks_heads=heads in (1, 3)
        )
        self.engine = Engine(
            self.runner,
            draft_heads=heads,
            max_batch=rows,
            step_tokens=step_tokens,
            prefix_cache_bytes=cache_bytes,
            snapshot_tokens=48,
        )
        self.open: dict[int, tuple[list[int], SamplingParams]] = {}

    @rule(
        start=st.sampled_from([0, 0, 0, 7]),
        length=st.integers(1, 150),
        own=st.integers(0, 3),
        max_tokens=st.integers(1, 40),
        n=st.sampled_from([1, 1, 1, 3]),
        temperature=st.sampled_from([0.0, 0.0, 0.9]),
    )
    def add(self, start: int, length: int, own: int, max_tokens: int, n: int, temperature: float) -> None:
        """Many prompts begin alike, so that the cache has hits."""
        prompt = [*TEXT[start : start + length], *[own] * own]
        params = SamplingParams(
            max_tokens=max_tokens,
            n=n,
            temperature=temperature,
            top_p=0.9,
            seed=own,
            ignore_eos=True,
            routed_experts=True,
        )
        if len(prompt) < 64 * self.runner.num_pages:
            self.open[self.engine.add_request(prompt, params)] = prompt, params

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                if event.completion is not None:
                    self.check(event.request_id, event.completion)

    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        if self.open:
            request_id = sorted(self.open)[which % len(self.open)]
            del self.open[request_id]
            self.engine.abort(request_id)

    @rule()
    def forget(self) -> None:
        self.engine.clear_prefix_cache()

    def check(self, request_id: int, done: Completion) -> None:
        prompt, params = self.open[request_id]
        expected = min(params.max_tokens, 64 * self.runner.num_pages - len(prompt))
        assert done.token_ids == oracle(prompt, params, done.choice, expected)
        assert done.routed_experts is not None
        assert done.routed_experts.tolist() == plain_routes([*prompt, *done.token_ids[:-1]]).tolist()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "engine"):
            return
        core = self.engine._core
        running, waiting, blocks = core.scheduler.running, core.scheduler.waiting, core.blocks
        entries = [] if core.prefix is None else list(core.prefix.entries.values())
        pinned = [sequence.entry for sequence in waiting if sequence.entry is not None]
        held = Counter(page for sequence in running for page in sequence.table.pages)
        held += Counter(page for entry in [*entries, *pinned] for page in entry.pages)
        assert [held[page] for page in range(self.runner.num_pages)] == blocks.holders
        assert sorted([*held, *blocks.free_pages]) == list(range(self.runner.num_pages))
        rows = [sequence.row for sequence in running]
        assert sorted(rows + blocks.free_rows) == list(range(self.runner.num_rows))
        assert self.engine.used_cache_bytes == 1000 * len(rows) + 700 * len(held)
        assert all(sequence.table.count == 0 and sequence.row == -1 for sequence in waiting)
        if core.prefix is not None:
            pages = {page for entry in entries for page in entry.pages}
            assert core.prefix.num_bytes == sum(entry.own_bytes for entry in entries) + 700 * len(pages)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_work:
            self.step(1)
            steps += 1
            assert steps < 5_000, "requests wait for ever"
        self.engine.clear_prefix_cache()
        assert self.engine.used_cache_bytes == 0


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, deadline=None)
