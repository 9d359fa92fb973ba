"""The sampler's distribution, read off exactly by sweeping the random number."""

from __future__ import annotations

import math

import pytest
import torch

from openmimo.engine import SamplingParams
from openmimo.engine.sampler import choose_greedy, logprobs_of, sample

PROBS = (0.05, 0.4, 0.0, 0.25, 0.3)


def swept(params: SamplingParams, *, num: int = 2000) -> tuple[list[float], dict[int, float]]:
    """The share of random numbers that give each token, and each drawn token's log-probability."""
    logits_BV = torch.tensor(PROBS).log().expand(num, -1)
    uniform_B = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    tokens_B, logprobs_B = sample(logits_BV, params, uniform_B)
    shares = (torch.bincount(tokens_B, minlength=len(PROBS)).double() / num).tolist()
    return shares, dict(zip(tokens_B.tolist(), logprobs_B.tolist(), strict=True))


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
        ({"temperature": 0.5}, (0, 1, 3, 4)),
        ({"temperature": 0.5, "top_p": 0.45}, (1,)),  # at temperature 0.5 token 1 alone holds 0.51 of the mass
    ],
)
def test_shares_equal_the_filtered_probabilities(options: dict[str, float], kept: tuple[int, ...]) -> None:
    """Catches filters off by one, a wrong order of steps, and log-probabilities of another distribution."""
    params = SamplingParams(**{"temperature": 1.0, **options})
    shares, logprobs = swept(params)
    weights = [PROBS[i] ** (1 / params.temperature) if i in kept else 0.0 for i in range(len(PROBS))]
    expected = [weight / sum(weights) for weight in weights]
    assert shares == pytest.approx(expected, abs=1e-3)
    for token, logprob in logprobs.items():
        assert logprob == pytest.approx(math.log(expected[token]), abs=1e-6)


def test_the_extreme_random_numbers_never_draw_an_impossible_token() -> None:
    """Catches token 0 with probability 0 at u = 0, and an index past the end at u near 1."""
    logits_BV = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).expand(2, -1)
    tokens_B, _ = sample(logits_BV, SamplingParams(temperature=1.0), torch.tensor([0.0, 1 - 2**-53]).double())
    assert tokens_B.tolist() == [1, 2]


def test_greedy_takes_the_lowest_of_equals_and_reports_the_models_logprob() -> None:
    logits_BTV = torch.tensor([[[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]]])
    choices_BT = choose_greedy(logits_BTV)
    assert choices_BT.tolist() == [[1, 0]]
    expected = logits_BTV.log_softmax(-1)[0, [0, 1], [1, 0]]
    torch.testing.assert_close(logprobs_of(logits_BTV.bfloat16(), choices_BT)[0], expected)
