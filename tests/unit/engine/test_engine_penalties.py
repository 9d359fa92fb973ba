"""Penalties and bias against a direct count over the text."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmimo.engine import SamplingParams
from openmimo.engine.penalties import LogitAdjuster

TOKENS = st.lists(st.integers(0, 11), max_size=12)


def expected(logits: np.ndarray, params: SamplingParams, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Straight from the definitions, token by token."""
    out, counts = logits.astype(np.float64).copy(), Counter(answer)
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in counts.items():
        out[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, bias in params.logit_bias.items():
        out[token] += bias
    return out


@given(prompt=TOKENS, answer=TOKENS, drafts=st.lists(st.integers(0, 11), max_size=3), more=TOKENS)
def test_every_position_counts_the_drafts_before_it_and_keeps_none(
    prompt: list[int], answer: list[int], drafts: list[int], more: list[int]
) -> None:
    """Catches a window that sees later drafts, and rejected drafts that go on being penalised."""
    params = SamplingParams(
        presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.4, logit_bias={3: 2.5, 11: -40.0}
    )
    adjuster = LogitAdjuster(params, prompt)
    logits = np.random.default_rng(0).normal(size=(1 + len(drafts), 12)).astype(np.float32) * 3
    for token in answer:
        adjuster.add(token)
    window = logits.copy()
    adjuster.apply_window(window, drafts)
    for row in range(1 + len(drafts)):
        want = expected(logits[row], params, prompt, answer + drafts[:row])
        np.testing.assert_allclose(window[row], want, atol=1e-5)
    for token in more:
        adjuster.add(token)
    after = logits[:1].copy()
    adjuster.apply_window(after, [])
    np.testing.assert_allclose(after[0], expected(logits[0], params, prompt, answer + more), atol=1e-5)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_the_prompt_is_not_penalised_for_presence(name: str) -> None:
    logits = np.ones((1, 4), dtype=np.float32)
    adjuster = LogitAdjuster(SamplingParams(**{name: 0.5}), [0, 0, 1])
    adjuster.add(2)
    adjuster.apply_window(logits, [])
    assert logits[0].tolist() == [1.0, 1.0, 0.5, 1.0]
