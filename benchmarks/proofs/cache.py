"""Rows and pages of the cache: a random walk over scheduler and cache, and their bytes beside the formula."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import ClassVar

from hypothesis import Phase, seed, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from common import print_table
from openmimo.config.cost import kv_cache_bytes
from openmimo.config.model import AttentionConfig, ModelConfig, MoEConfig, preset
from openmimo.engine import Engine, SamplingParams
from openmimo.engine.runner import PAGE_TOKENS
from openmimo.model import build_model

sys.path += [str(Path(__file__).parents[2] / "tests" / part) for part in ("property", "unit/engine")]
from test_engine_machine import EngineMachine

ROUND_EXAMPLES, EXAMPLE_STEPS = 200, 50
BYTES_BAR = 0.01
PRESETS, LENGTHS = ("tiny", "small", "medium"), (200, 1000, 4000)


class CountingMachine(EngineMachine):
    """The property test's machine, which fails on a leak, an overlap or a wrong count after every step."""

    num_steps: ClassVar[int] = 0
    num_forwards: ClassVar[int] = 0
    num_preemptions: ClassVar[int] = 0

    @invariant()
    def count(self) -> None:
        CountingMachine.num_steps += 1

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            CountingMachine.num_forwards += self.runner.num_forwards
            CountingMachine.num_preemptions += self.engine._core.scheduler.num_preemptions


def prove_cache(*, num_steps: int) -> dict[str, object]:
    """Walk `num_steps` steps, then compare bytes; raises AssertionError, with the walk, on the first fault."""
    started, round_number = time.perf_counter(), 0
    options = settings(
        max_examples=ROUND_EXAMPLES, stateful_step_count=EXAMPLE_STEPS, deadline=None, database=None,
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    while CountingMachine.num_steps < num_steps:
        run_state_machine_as_test(seed(round_number)(CountingMachine), settings=options)
        round_number += 1
        print(f"{CountingMachine.num_steps:,} steps without a fault", file=sys.stderr, flush=True)
    rows = [row for name in PRESETS for row in compare_bytes(name)]
    print_table(("attention of", "tokens", "cache bytes", "formula", "over", "sliding layers"), rows)
    worst = max(abs(row[4]) for row in rows)
    return {
        "steps": CountingMachine.num_steps,
        "forward_passes": CountingMachine.num_forwards,
        "preemptions": CountingMachine.num_preemptions,
        "bytes": [
            dict(zip(("preset", "tokens", "bytes", "formula", "over", "sliding"), row, strict=True)) for row in rows
        ],
        "worst_bytes_error": worst,
        "failures": int(worst > BYTES_BAR),
        "seconds": time.perf_counter() - started,
    }


def compare_bytes(name: str) -> list[tuple[str, int, int, int, float, int]]:
    """What an engine says it uses for one text of each length, and what `config.cost` says, in whole pages."""
    config = thin(preset(name))
    engine = Engine(
        build_model(config),
        runner="native",
        max_batch=1,
        cache_tokens=max(LENGTHS) + PAGE_TOKENS,
        prefix_cache_bytes=0,
    )
    rows: list[tuple[str, int, int, int, float, int]] = []
    for length in LENGTHS:
        request = engine.add_request([1] * length, SamplingParams(max_tokens=8, ignore_eos=True))
        while not engine.step():
            pass
        whole_pages = math.ceil(length / PAGE_TOKENS) * PAGE_TOKENS
        heads = config.num_mtp_heads
        formula = kv_cache_bytes(config, whole_pages, draft_slots=heads, mtp_heads=heads)
        used, sliding = engine.used_cache_bytes, engine.runner.row_bytes
        rows.append((name, length, used, formula.total, used / formula.total - 1, sliding))
        engine.abort(request)
        assert engine.used_cache_bytes == 0, "an aborted request keeps some of the cache"
    return rows


def thin(config: ModelConfig) -> ModelConfig:
    """The same layers, keys and values with hardly any weights, so that it is made in a moment."""
    return config.replace(
        vocab_size=64,
        hidden_size=64,
        dense_dim=64,
        moe=MoEConfig(num_experts=2, num_experts_per_token=1, expert_dim=32),
        global_attention=_few_heads(config.global_attention),
        sliding_attention=_few_heads(config.sliding_attention),
    )


def _few_heads(attention: AttentionConfig) -> AttentionConfig:
    return dataclasses.replace(attention, num_heads=attention.num_kv_heads)
