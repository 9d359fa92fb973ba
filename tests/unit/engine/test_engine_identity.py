"""The same text and routes from a real model, however it is batched, cut, cached and drafted."""

from __future__ import annotations

import pytest
from engine_fakes import awkward_prompts, plain_tokens, small_model

from openmimo.engine import Engine, SamplingParams
from openmimo.errors import RequestError

NUM_TOKENS = 16


def open_engine(runner: str, model, **options) -> Engine:
    try:
        return Engine(model, runner=runner, weights="float32", step_tokens=64, threads=1, **options)
    except RequestError as error:
        if runner == "native" and "cannot be used" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("runner", ["torch", "native"])
@pytest.mark.parametrize("draft_heads", [0, 1, 2, 3, "auto"])
def test_greedy_text_and_routes_are_those_of_a_plain_forward_pass(runner: str, draft_heads: int | str) -> None:
    """Catches whatever the hashes of the fake runner cannot: keys, positions and hidden states of a real model."""
    model = small_model()
    prompts = [awkward_prompts(11, longest=90)[i] for i in (0, 2, 5, 8, 9, 10)]
    texts = plain_tokens(model, prompts, NUM_TOKENS)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, routed_experts=True)
    routes = None
    for batch, chunk, cache in ((1, None, 0), (7, 9, 0), (1, 9, 1 << 24), (7, None, 1 << 24)):
        engine = open_engine(
            runner,
            model,
            draft_heads=draft_heads,
            max_batch=batch,
            chunk_tokens=chunk,
            prefix_cache_bytes=cache,
            snapshot_tokens=32,
        )
        for _ in range(2 if cache else 1):
            done = engine.generate(prompts, params)
            assert [each.token_ids for each in done] == texts, (batch, chunk, cache)
            found = [each.routed_experts.tolist() for each in done if each.routed_experts is not None]
            routes = routes or found
            assert found == routes
        long = [len(prompt) >= 16 and cache > 0 for prompt in prompts]
        assert [each.num_cached_tokens > 0 for each in done] == long


@pytest.mark.parametrize("runner", ["torch", "native"])
def test_sampled_text_does_not_depend_on_drafts_or_company(runner: str) -> None:
    """Catches random numbers that follow the step in place of the position; on the native runner even in the bits."""
    model, prompts = small_model(seed=2), awkward_prompts(6, longest=60)
    params = SamplingParams(
        temperature=0.9, top_p=0.95, frequency_penalty=0.2, max_tokens=20, seed=4, ignore_eos=True, logprobs=True
    )
    expected = open_engine(runner, model, draft_heads=0, max_batch=1).generate(prompts, params)
    for draft_heads, batch in ((0, 6), (3, 1), (2, 5), ("auto", 6)):
        engine = open_engine(runner, model, draft_heads=draft_heads, max_batch=batch, chunk_tokens=7)
        for mine, other in zip(engine.generate(prompts, params), expected, strict=True):
            assert mine.token_ids == other.token_ids
            assert mine.logprobs == (other.logprobs if runner == "native" else pytest.approx(other.logprobs, abs=1e-5))


@pytest.mark.parametrize("runner", ["torch", "native"])
def test_acceptance_after_a_cached_beginning_is_that_of_a_computed_one(runner: str) -> None:
    """Catches snapshots without the heads' keys: text would be right and drafts worse."""
    model, (prompt,) = small_model(seed=5), awkward_prompts(9, longest=90)[-1:]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    engine = open_engine(runner, model, draft_heads=3, max_batch=1)
    other = open_engine(runner, model, draft_heads=3, max_batch=1, prefix_cache_bytes=0)
    for extra in ([], [5], [7, 8, 9], [7, 8, 9, 1, 2, 3, 4]):
        mine, fresh = (each.generate([[*prompt, *extra]], params)[0] for each in (engine, other))
        assert mine.draft.histogram == fresh.draft.histogram
        assert mine.num_cached_tokens == (len(prompt) if extra else 0) + (3 if len(extra) > 3 else 0)
