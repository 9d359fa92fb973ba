"""Logits that are no numbers end their own answer, with what was written before, and nobody else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_fakes import EOS, ByteCodec, awkward_prompts, small_model

from openmimo.engine import Completion, Engine, SamplingParams
from openmimo.errors import TrainingError
from openmimo.model import MiMoModel
from openmimo.rl import trajectory

BAD = 300
RUNNERS = ["torch", "native"]


def broken_model() -> MiMoModel:
    """Finite for every text without the token `BAD`."""
    model = small_model()
    with torch.no_grad():
        model.embed_tokens.weight[BAD] = torch.nan
    return model


def engine_of(model: MiMoModel, runner: str, **options: Any) -> Engine:
    if runner == "native":
        pytest.importorskip("openmimo._native", reason="the C++ extension is not built")
    return Engine(model, tokenizer=ByteCodec(), runner=runner, max_batch=8, threads=1, **options)


def comparable(done: Completion, *, exact: bool) -> object:
    if not exact:  # of PyTorch's products the last bits depend on the batch
        return done.token_ids, done.finish_reason
    routes = None if done.routed_experts is None else done.routed_experts.tolist()
    return replace(done, num_cached_tokens=0, routed_experts=None), routes


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=12, ignore_eos=True),
        SamplingParams(
            max_tokens=12,
            ignore_eos=True,
            n=2,
            temperature=1.0,
            seed=3,
            top_k=40,
            top_p=0.9,
            min_p=0.01,
            logprobs=True,
            top_logprobs=3,
            routed_experts=True,
        ),
    ],
    ids=["greedy", "drawn"],
)
def test_a_prompt_that_breaks_the_model_leaves_the_others_alone(runner: str, params: SamplingParams) -> None:
    """Catches tokens drawn from NaN, a step that fails for all, and NaN in a row or page that the next one inherits."""
    model, bad = broken_model(), [[1, BAD, 2], [BAD], [*range(70), BAD, *range(70)]]
    first, *others = awkward_prompts(5)
    engine = engine_of(model, runner, draft_heads=3)
    whole = engine_of(model, runner, draft_heads=3).generate([first, [1, 2], *others, [1], [*range(140)]], params)
    for _ in range(2):  # once more, from what the prefix cache has of them
        done = engine.generate([first, bad[0], *others, *bad[1:]], params)
        for place, (found, expected) in enumerate(zip(done, whole, strict=True)):
            if place // params.n in (1, 6, 7):
                assert (found.finish_reason, found.token_ids, found.text) == ("error", (), "")
                assert found.logprobs == (() if params.logprobs else None)
            else:
                exact = runner == "native"
                assert comparable(found, exact=exact) == comparable(expected, exact=exact), place
    assert not engine.has_work


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_answer_keeps_what_came_before_the_fault(runner: str) -> None:
    """Catches tokens that are lost, a stop token of the prompt that ends the answer, and events that go astray."""
    engine = engine_of(broken_model(), runner, draft_heads=3)
    params = SamplingParams(max_tokens=12, ignore_eos=True, logit_bias={BAD: 100.0}, logprobs=True, routed_experts=True)
    events = list(engine.stream([5, 6, EOS], params))
    done = events[-1].completion
    assert done is not None
    assert (done.finish_reason, done.stopped_by, done.token_ids) == ("error", None, (BAD,))
    assert [token for event in events for token in event.token_ids] == [BAD]
    assert done.logprobs is not None
    assert len(done.logprobs) == 1
    assert done.routed_experts is not None
    assert len(done.routed_experts) == 3
    assert events[-1].token_ids == events[-1].pieces == ()
    (other,) = engine.generate([[5, 6, EOS]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert (other.finish_reason, len(other.token_ids)) == ("length", 4)


def test_training_does_not_go_on_with_it() -> None:
    """Catches an answer without tokens among the groups that a policy learns from."""
    engine = engine_of(broken_model(), "torch")
    (done,) = engine.generate([[BAD]], SamplingParams(max_tokens=4, logprobs=True))
    with pytest.raises(TrainingError, match="after 0 tokens of an answer the policy's logits are no numbers"):
        trajectory.Trajectory.from_completion(None, done)  # type: ignore[arg-type]
