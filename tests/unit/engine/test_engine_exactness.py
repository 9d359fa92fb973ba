"""Sampled answers follow the target distribution exactly, drafts or not: chi-square over whole short answers."""

from __future__ import annotations

import pytest
from exact_cases import DRAWS, LENGTH, OPTIONS, PROMPT, VOCAB, TableRunner, assert_exact

from openmimo.engine import Engine, SamplingParams


@pytest.mark.parametrize("draft_heads", [0, 3])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_whole_answers_have_their_exact_probability(name: str, draft_heads: int) -> None:
    """Catches drafts that favour the probable token, and any option applied wrongly, late or twice."""
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=11, **OPTIONS[name])
    runner = TableRunner(num_rows=32, num_pages=64, max_step_tokens=256, vocab_size=VOCAB)
    engine = Engine(runner, draft_heads=draft_heads, max_batch=32, step_tokens=256, prefix_cache_bytes=0)
    answers = engine.generate([PROMPT] * (DRAWS // LENGTH), params)
    assert_exact([done.token_ids for done in answers], params)
