"""`recorded_logprobs`: what a trainer computes from logits is what the engine recorded, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmimo.engine import SamplingParams
from openmimo.engine.penalties import LogitAdjuster
from openmimo.engine.sampler import SLICE_ROWS, RowOptions, choose, random_state, recorded_logprobs

# Remainders of every width of vector, and of the blocks in which weights are added up.
SIZES = (1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 1000, 4096, 4099, 9001)


def random_logits(rows: int, size: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, size)) * 4).astype(np.float32)


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 50]),
        "top_p": st.sampled_from([1.0, 0.95, 0.3]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5]),
        "presence_penalty": st.sampled_from([0.0, 0.4]),
        "frequency_penalty": st.sampled_from([0.0, -0.3]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logit_bias": st.sampled_from([{}, {0: 2.5}]),
    }
)


@given(OPTIONS, st.sampled_from(SIZES), st.integers(0, 3))
def test_they_are_what_the_sampler_records(options: dict, size: int, before: int) -> None:
    """An answer drawn token by token, each in a batch of other requests, against the whole answer at once.

    Catches another order of steps, sums or logarithms, penalties of the wrong prefix, and results of a row that
    depend on its neighbours or on where it lies in memory.
    """
    params, prompt = SamplingParams(**options), [0, size - 1]
    logits_TV = random_logits(9, size, seed=size)
    other = SamplingParams(temperature=0.9, top_p=0.8)
    adjuster = LogitAdjuster(params, prompt)
    token_ids: list[int] = []
    recorded: list[float] = []
    for place, logits_V in enumerate(logits_TV):
        batch_MV = random_logits(before + 2, size, seed=place)
        batch_MV[before] = logits_V
        adjuster.apply(batch_MV[before])
        rows = [(other, 1, 5, before), (params, random_state(3, 0), place, 1), (other, 2, 9, 1)]
        choices = choose(batch_MV, RowOptions.make(rows))
        token_ids.append(int(choices.tokens_M[before]))
        recorded += choices.logprobs(before, 1)
        adjuster.add(token_ids[-1])
    untouched = logits_TV.copy()
    assert recorded_logprobs(logits_TV, token_ids, params, prompt) == recorded
    assert np.array_equal(logits_TV, untouched)


@pytest.mark.parametrize("size", SIZES)
def test_a_row_gives_the_same_bits_at_any_place(size: int) -> None:
    """Catches exponentials and sums whose last elements take other code, at every offset in an array of rows."""
    params = SamplingParams(temperature=0.8)
    logits_V = random_logits(1, size)[0]
    (expected,) = recorded_logprobs(logits_V[None], [size // 2], params)
    for rows in (2, 3, 5, 17):
        beside_MV = random_logits(rows, size, seed=rows)
        for place in range(rows):
            logits_MV = beside_MV.copy()
            logits_MV[place] = logits_V
            assert recorded_logprobs(logits_MV, [size // 2] * rows, params)[place] == expected
        wider_MV = np.concatenate((logits_MV, beside_MV), axis=1)[:, :size]
        assert recorded_logprobs(wider_MV, [size // 2] * rows, params)[-1] == expected


def test_a_long_answer_is_one_answer() -> None:
    """Catches a penalty or an option that starts again with every slice of rows."""
    rows, params = 2 * SLICE_ROWS + 3, SamplingParams(temperature=1.0, frequency_penalty=0.05)
    logits_TV = random_logits(rows, 40)
    token_ids = (np.arange(rows) % 7).tolist()
    found = recorded_logprobs(logits_TV, token_ids, params)
    counts_TV = np.stack([np.bincount(token_ids[:place], minlength=40) for place in range(rows)])
    exact_TV = logits_TV.astype(np.float64) - 0.05 * counts_TV
    exact_TV -= np.log(np.exp(exact_TV).sum(axis=1, keepdims=True))
    assert found == pytest.approx(exact_TV[np.arange(rows), token_ids], abs=1e-5)


def test_a_token_that_the_options_leave_out_is_impossible() -> None:
    """Catches an error, or a warning with a number that looks like a probability."""
    logits_TV = np.array([[0.0, 1.0, 2.0]], dtype=np.float32)
    assert recorded_logprobs(logits_TV, [0], SamplingParams(temperature=1.0, top_k=1)) == [-math.inf]
    assert recorded_logprobs(logits_TV, [2], SamplingParams(temperature=1.0, top_k=1)) == [0.0]
    assert recorded_logprobs(logits_TV[:0], [], SamplingParams(temperature=1.0)) == []
