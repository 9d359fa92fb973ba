"""Weights that change under the engine, and answers that stop in the middle and go on."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_fakes import awkward_prompts, small_model

from openmimo.engine import Completion, Engine, PartialAnswer, SamplingParams
from openmimo.errors import RequestError
from openmimo.model import MiMoModel

PARAMS = SamplingParams(
    max_tokens=24, ignore_eos=True, temperature=0.9, seed=5, n=3, logprobs=True, routed_experts=True
)
RUNNERS = ("torch", "native")


def new_engine(model: MiMoModel, runner: str, **options: object) -> Engine:
    settings: dict[str, object] = {"draft_heads": 3, "max_batch": 4, "weights": "float32"}
    return Engine(copy.deepcopy(model), runner=runner, **(settings | options))


def finish(engine: Engine, requests: list[int]) -> dict[tuple[int, int], Completion]:
    """Step until all answers of these requests are there, by place of the request and choice."""
    done: dict[tuple[int, int], Completion] = {}
    while engine.has_work:
        for event in engine.step():
            if event.completion is not None:
                done[requests.index(event.request_id), event.choice] = event.completion
    return done


def records(completion: Completion) -> tuple[object, ...]:
    assert completion.routed_experts is not None
    return completion.token_ids, completion.logprobs, completion.routed_experts.tolist()


@pytest.mark.parametrize("runner", RUNNERS)
def test_new_weights_answer_as_an_engine_made_with_them(runner: str) -> None:
    """Catches weights that stay, and prompts taken up from what older weights computed."""
    old, new = small_model(), small_model(seed=7)
    prompts = [*awkward_prompts(3), [*range(40)]]
    engine = new_engine(old, runner)
    before = engine.generate(prompts, PARAMS)
    assert engine.update_weights(new) == engine.weights_version == 1
    after = engine.generate(prompts, PARAMS)
    fresh = new_engine(new, runner).generate(prompts, PARAMS)
    assert [each.token_ids for each in after] == [each.token_ids for each in fresh]
    assert [each.token_ids for each in after] != [each.token_ids for each in before]
    assert {each.weights_versions for each in after} == {((0, 1),)}
    assert all(each.num_cached_tokens == 0 for each in after[::3])


@pytest.mark.parametrize("runner", RUNNERS)
def test_answers_in_progress_go_on_under_new_weights(runner: str) -> None:
    """Every token names the weights that drew it; what was written stays, what follows comes from the new ones."""
    old, new = small_model(), small_model(seed=7)
    prompt = [*range(30)]
    engine = new_engine(old, runner)
    request = engine.add_request(prompt, PARAMS)
    for _ in range(5):
        engine.step()
    parts = {part.choice: part for part in engine.unfinished(request)}
    assert set(parts) == {0, 1, 2}
    engine.update_weights(new)
    plain = new_engine(old, runner).generate([prompt], PARAMS)
    changed = False
    for (_, choice), completion in finish(engine, [request]).items():
        size = len(parts[choice].token_ids)
        assert completion.token_ids[:size] == plain[choice].token_ids[:size]
        assert completion.weights_versions == (((0, 0), (size, 1)) if size else ((0, 1),))
        changed |= completion.token_ids != plain[choice].token_ids
    assert changed


def test_choices_that_wait_do_not_start_from_old_logits() -> None:
    """With one row the second choice begins after the change: its first token must come from the new weights."""
    old, new = small_model(), small_model(seed=7)
    prompt = [*range(30)]
    engine = new_engine(old, "torch", max_batch=1)
    request = engine.add_request(prompt, PARAMS)
    while len(engine.unfinished(request)) == 3:
        engine.step()
    engine.update_weights(new)
    done = finish(engine, [request])
    fresh = new_engine(new, "torch", max_batch=1).generate([prompt], PARAMS)
    assert done[0, 2].weights_versions == ((0, 1),)
    assert records(done[0, 2]) == records(fresh[2])


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("heads", [0, 3])
def test_parked_answers_go_on_in_another_engine(runner: str, heads: int) -> None:
    """Catches lost or repeated tokens, random numbers of the wrong place, and routes that are recorded twice."""
    model, prompts = small_model(), awkward_prompts(3, longest=30)
    whole = new_engine(model, runner, draft_heads=heads)
    requests = [whole.add_request(prompt, PARAMS, index=index) for index, prompt in enumerate(prompts)]
    expected = finish(whole, requests)
    first = new_engine(model, runner, draft_heads=heads)
    requests = [first.add_request(prompt, PARAMS, index=index) for index, prompt in enumerate(prompts)]
    done: dict[tuple[int, int], Completion] = {}
    for _ in range(12):
        for event in first.step():
            if event.completion is not None:
                done[requests.index(event.request_id), event.choice] = event.completion
    parts = [first.unfinished(request) for request in requests]
    assert any(parts)
    second = new_engine(model, runner, draft_heads=heads)
    again = [
        second.add_request(prompt, PARAMS, index=index, parts=parts[index]) for index, prompt in enumerate(prompts)
    ]
    done |= finish(second, again)
    assert set(done) == set(expected)
    for key, completion in done.items():
        assert completion.token_ids == expected[key].token_ids
        assert completion.logprobs == pytest.approx(expected[key].logprobs, abs=1e-5)
        assert completion.routed_experts is not None
        assert completion.routed_experts.tolist() == expected[key].routed_experts.tolist()
    assert second.unfinished(again[0]) == ()


def test_parts_that_do_not_belong_are_refused() -> None:
    """Each error names what was got and expected."""
    engine = new_engine(small_model(), "torch")
    with pytest.raises(RequestError, match=r"24 tokens and 0 log-prob.*fewer than max_tokens=24"):
        engine.add_request([1, 2], PARAMS, parts=[PartialAnswer(choice=0, token_ids=(1,) * 24)])
    with pytest.raises(RequestError, match="has routes None; expected"):
        engine.add_request([1, 2], PARAMS, parts=[PartialAnswer(choice=0, token_ids=(1,), logprobs=(-1.0,))])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.add_request([1, 2], SamplingParams(), parts=[PartialAnswer(choice=0, token_ids=(10**6,))])
    assert not engine.has_work


def test_weights_of_another_shape_are_refused() -> None:
    """And the engine still answers with those it has."""
    model = small_model()
    for runner in RUNNERS:
        engine = new_engine(model, runner)
        expected = engine.generate([[1, 2, 3]], PARAMS)
        with pytest.raises(RequestError, match="cannot take these weights"):
            engine.update_weights(small_model(hidden_size=32))
        assert engine.weights_version == 0
        assert [each.token_ids for each in engine.generate([[1, 2, 3]], PARAMS)] == [e.token_ids for e in expected]


def test_the_model_of_the_torch_runner_is_used_in_place() -> None:
    """A trainer's own model needs no copy: its new weights are there at once."""
    model = small_model()
    engine = Engine(model, runner="torch", draft_heads=0)
    before = engine.generate([[1, 2, 3]], PARAMS)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    engine.update_weights(model)
    assert engine.generate([[1, 2, 3]], PARAMS)[0].token_ids != before[0].token_ids
