"""The sampler's distribution, read off exactly by sweeping the random number, and its random numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openmimo.engine import SamplingParams
from openmimo.engine import sampler as module
from openmimo.engine.sampler import Choices, RowOptions, choose, greedy, random_state, uniforms

PROBS = (0.05, 0.4, 0.0, 0.25, 0.3)
NUM = 2000


def logits_of(probs: tuple[float, ...], num: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probs, dtype=np.float32))[None].repeat(num, 0)


def swept(
    monkeypatch: pytest.MonkeyPatch, params: SamplingParams, beside: SamplingParams | None = None
) -> tuple[list[float], Choices]:
    """The share of random numbers that give each token; rows of other options can stand beside."""
    extra = 3 if beside else 0
    rows = [(params, 0, 0, NUM), *([(beside, 0, 0, extra)] if beside else [])]
    numbers = np.concatenate(((np.arange(NUM) + 0.5) / NUM, np.full(extra, 0.5)))
    monkeypatch.setattr(module, "uniforms", lambda states, positions: numbers)
    choices = choose(logits_of(PROBS, NUM + extra), RowOptions.make(rows))
    return (np.bincount(choices.tokens_M[:NUM], minlength=len(PROBS)) / NUM).tolist(), choices


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, (0, 1, 3, 4)),
        ({"top_k": 2}, (1, 4)),
        ({"top_k": 99}, (0, 1, 3, 4)),
        ({"top_p": 0.4}, (1,)),
        ({"top_p": 0.41}, (1, 4)),
        ({"top_p": 0.96}, (0, 1, 3, 4)),
        ({"top_p": 0.5, "top_k": 3}, (1, 4)),
        ({"top_p": 1e-9}, (1,)),
        ({"min_p": 0.6}, (1, 3, 4)),
        ({"min_p": 0.7}, (1, 4)),
        ({"min_p": 1.0}, (1,)),
        ({"min_p": 0.7, "top_p": 0.4}, (1,)),
        ({"temperature": 0.5}, (0, 1, 3, 4)),
        ({"temperature": 0.5, "top_p": 0.45}, (1,)),  # at temperature 0.5 token 1 alone holds 0.51 of the mass
        ({"temperature": 0.5, "min_p": 0.5}, (1, 4)),  # (0.3 / 0.4)^2 = 0.56, (0.25 / 0.4)^2 = 0.39
    ],
)
def test_shares_equal_the_filtered_probabilities(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, float], kept: tuple[int, ...]
) -> None:
    """Catches filters off by one, a wrong order of steps, options of the row beside, and wrong log-probabilities."""
    params = SamplingParams(**{"temperature": 1.0, **options})
    shares, choices = swept(monkeypatch, params, SamplingParams(temperature=9.0, top_k=1, min_p=0.3))
    weights = [PROBS[i] ** (1 / params.temperature) if i in kept else 0.0 for i in range(len(PROBS))]
    expected = [weight / sum(weights) for weight in weights]
    assert shares == pytest.approx(expected, abs=1e-3)
    logprobs = choices.logprobs(0, NUM)
    for token, logprob in zip(choices.tokens_M[:NUM:97].tolist(), logprobs[::97], strict=True):
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-6)
    best = choices.top_logprobs(0, 9)
    assert list(best) == sorted(kept, key=lambda token: -expected[token])
    assert list(best.values()) == pytest.approx([math.log(expected[token]) for token in best], abs=1e-6)


def test_the_lowest_of_equals_stay_when_not_all_fit() -> None:
    """Catches ties that are resolved by a sort's whim, differently from run to run or batch to batch."""
    logits = np.zeros((1, 6), dtype=np.float32)
    for options, kept in (({"top_k": 2}, [0, 1]), ({"top_p": 0.34}, [0, 1, 2])):
        choices = choose(logits, RowOptions.make([(SamplingParams(temperature=1.0, **options), 0, 0, 1)]))
        assert np.flatnonzero(choices.weights_MV[0]).tolist() == kept


def test_the_extreme_random_numbers_never_draw_an_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches token 0 with probability 0 at u = 0, and an index past the end at u near 1."""
    logits = np.array([[-math.inf, 0.0, 0.0, -math.inf]], dtype=np.float32).repeat(2, 0)
    monkeypatch.setattr(module, "uniforms", lambda states, positions: np.array([0.0, 1 - 2**-53]))
    assert choose(logits, RowOptions.make([(SamplingParams(temperature=1.0), 0, 0, 2)])).tokens_M.tolist() == [1, 2]


def test_greedy_takes_the_lowest_of_equals_and_reports_the_models_logprob() -> None:
    logits = np.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]], dtype=np.float32)
    assert greedy(logits) == [1, 0]
    choices = choose(logits, RowOptions.make([(SamplingParams(top_k=1, logprobs=True), 0, 0, 2)]))
    assert choices.tokens_M.tolist() == [1, 0]
    expected = [3 - math.log(math.exp(1) + 2 * math.exp(3)), -math.log(1 + math.exp(-1) + math.exp(-2))]
    assert choices.logprobs(0, 2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-20])
def test_the_smallest_temperatures_take_the_most_probable_token(temperature: float) -> None:
    """Catches a scale beyond float32, which makes numbers that are none, and of them tokens that do not exist."""
    logits_MV = np.array([[3.0, 60.0, -1e9, 59.9]], np.float32)
    options = RowOptions.make([(SamplingParams(temperature=temperature), 5, 0, 1)])
    chosen = choose(logits_MV, options)
    assert chosen.tokens_M.tolist() == [1]
    assert chosen.logprobs(0, 1) == [0.0]


def test_a_row_gives_the_same_bits_whatever_stands_beside_it() -> None:
    """Catches sums and exponentials whose order depends on the batch."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 1031)).astype(np.float32)
    params = [SamplingParams(temperature=0.7 + i / 9, top_p=0.8, top_k=i * 40, min_p=0.01 * i) for i in range(9)]
    together = choose(logits, RowOptions.make([(p, 7, i, 1) for i, p in enumerate(params)]))
    for row in range(9):
        alone = choose(logits[row : row + 1], RowOptions.make([(params[row], 7, row, 1)]))
        assert alone.tokens_M[0] == together.tokens_M[row]
        assert alone.logprobs(0, 1) == together.logprobs(row, 1)


def test_random_numbers_are_uniform_and_streams_independent() -> None:
    """Catches a counter that repeats, correlates neighbours, or gives choices of one request the same numbers."""
    positions = np.arange(200_000, dtype=np.uint64)
    streams = [random_state(seed, choice) for seed in (0, 1, -5) for choice in (0, 1)]
    assert len(set(streams)) == 6
    numbers = [uniforms(np.full(200_000, state, dtype=np.uint64), positions) for state in streams]
    for u in numbers:
        assert 0.0 <= u.min() < u.max() < 1.0
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        assert ((counts - 2000) ** 2 / 2000).sum() < 160  # 99 degrees of freedom: p = 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01
    for i in range(6):
        for j in range(i):
            assert abs(np.corrcoef(numbers[i], numbers[j])[0, 1]) < 0.01
