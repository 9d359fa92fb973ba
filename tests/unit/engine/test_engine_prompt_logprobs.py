"""Log-probabilities of a prompt's own tokens, against a forward pass of the whole prompt in PyTorch."""

from __future__ import annotations

import pytest
import torch
from engine_fakes import VOCAB, awkward_prompts, make_engine, small_model

from openmimo.engine import Engine, SamplingParams

PROMPTS = [*awkward_prompts(10, longest=150), awkward_prompts(40, seed=3, longest=300)[-1]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(small_model(), max_batch=4, step_tokens=32, snapshot_tokens=16)


def expected(prompt: list[int], num_top: int) -> tuple[list[float], list[list[int]]]:
    with torch.inference_mode():
        logits_TV = small_model()(torch.tensor([prompt])).logits[0, :-1].double()
    logprobs_TV = logits_TV.log_softmax(dim=-1)
    own = logprobs_TV.gather(1, torch.tensor(prompt[1:], dtype=torch.long)[:, None])[:, 0]
    return own.tolist(), logprobs_TV.topk(num_top, dim=-1).indices.tolist()


def test_every_token_but_the_first_has_the_models_own_probability(engine: Engine) -> None:
    """Catches rows that are off by one, chunks that lose or repeat their border, and options that leak into them."""
    params = SamplingParams(
        temperature=0.7, top_k=3, logit_bias={5: 4.0}, max_tokens=3, top_logprobs=2, prompt_logprobs=True, seed=0
    )
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        own, best = expected(prompt, 2)
        assert completion.prompt_logprobs == pytest.approx(own, abs=2e-4)
        assert completion.prompt_top_logprobs is not None
        assert [list(top) for top in completion.prompt_top_logprobs] == best
        assert completion.num_cached_tokens == 0


def test_they_change_nothing_else(engine: Engine) -> None:
    """Catches a token, route or draft that depends on whether the prompt was scored; beside others, and cached."""
    plain = SamplingParams(temperature=1.0, max_tokens=20, seed=4, routed_experts=True, logprobs=True)
    scored = SamplingParams(
        temperature=1.0, max_tokens=20, seed=4, routed_experts=True, logprobs=True, prompt_logprobs=True
    )
    for first, second in zip(engine.generate(PROMPTS, plain), engine.generate(PROMPTS, scored), strict=True):
        assert first.prompt_logprobs is None
        assert first.token_ids == second.token_ids
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-5)  # chunks of other sizes
        assert first.routed_experts is not None
        assert second.routed_experts is not None
        assert (first.routed_experts == second.routed_experts).all()


def test_a_prompt_that_is_computed_twice_is_scored_once() -> None:
    """Catches values that are appended again after a preemption: the cache holds two of three texts."""
    prompts = [[(7 * place + number) % VOCAB for place in range(200)] for number in range(3)]
    engine = make_engine(small_model(), max_batch=3, step_tokens=48, cache_tokens=640, prefix_cache_bytes=0)
    params = SamplingParams(max_tokens=180, ignore_eos=True, prompt_logprobs=True)
    answers = engine.generate(prompts, params)
    assert engine.load.num_preemptions > 0
    for prompt, completion in zip(prompts, answers, strict=True):
        assert completion.prompt_logprobs == pytest.approx(expected(prompt, 1)[0], abs=2e-4)


def test_of_several_choices_the_first_has_them(engine: Engine) -> None:
    """Catches records that are shared, or scored once per choice."""
    first, *others = engine.generate([PROMPTS[-1]], SamplingParams(temperature=1.0, n=3, prompt_logprobs=True))
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(PROMPTS[-1]) - 1
    assert all(completion.prompt_logprobs == () for completion in others)
