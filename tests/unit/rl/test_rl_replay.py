"""Rollout routing replay: the eight ways in which recorded experts go wrong, each shown to be noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_cases import base_folder, rl_recipe
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openmimo.checkpoint import load_model
from openmimo.config.rl import Algorithm, Signal, TeacherRecipe
from openmimo.engine import Completion, Engine, SamplingParams
from openmimo.errors import TrainingError
from openmimo.model import MiMoModel
from openmimo.model.moe import Router
from openmimo.rl.batching import MicroBatch, pack
from openmimo.rl.losses.ratios import group_advantages
from openmimo.rl.monitors import route_difference
from openmimo.rl.scheduler import PromptScheduler
from openmimo.rl.teachers import Teachers
from openmimo.rl.trajectory import Trajectory
from openmimo.rl.update import AnswerTargets, PolicyUpdater
from openmimo.text import ChatTemplate, Tokenizer
from openmimo.train.optimizer import MasterAdamW

NUM_ANSWERS, EXPERTS = 12, 8


def folder() -> Path:
    return base_folder() / "model"


@cache
def sampled(
    heads: int = 3, weights: str = "int8", *, prompts: int = NUM_ANSWERS, group: int = 1
) -> tuple[Trajectory, ...]:
    """Answers of the native sampler in 8 bits."""
    recipe = rl_recipe(sources=[{"domain": "logic"}])
    template = ChatTemplate(Tokenizer.load(folder()))
    scheduler = PromptScheduler(recipe, lambda text: template.render([{"role": "user", "content": text}]))
    drawn = [scheduler.next() for _ in range(prompts)]
    engine = Engine(folder(), weights=weights, draft_heads=heads, max_batch=5)
    answers: list[Trajectory] = []
    for prompt in drawn:
        params = SamplingParams(
            temperature=1.0, max_tokens=60, seed=prompt.seed, n=group, logprobs=True, routed_experts=True
        )
        answers += [Trajectory.from_completion(prompt, one) for one in engine.generate([prompt.token_ids], params)]
    return tuple(answers)


def targets(answers: tuple[Trajectory, ...]) -> AnswerTargets:
    rewards_PG = torch.arange(len(answers), dtype=torch.float64).sin().view(-1, 4)
    return AnswerTargets(
        lengths_S=torch.tensor([len(one.token_ids) for one in answers]),
        share_S=torch.full((len(answers),), 1.0 / len(answers)),
        advantages_S=group_advantages(rewards_PG).flatten().float(),
    )


def gradients(
    answers: tuple[Trajectory, ...],
    *,
    max_tokens: int = 4096,
    order: list[int] | None = None,
    share_prompts: bool = False,
) -> dict[str, Tensor]:
    """Gradients of the policy's loss by parameter, in fp32."""
    model = load_model(folder())
    optimizer = MasterAdamW(model.named_parameters())
    updater = PolicyUpdater(
        model, optimizer, rl_recipe().loss, Algorithm.GRPO, rollout=rl_recipe().rollout, num_tokens=420
    )
    updater.begin()
    options = {"max_tokens": max_tokens, "num_experts": EXPERTS, "chosen": order, "share_prompts": share_prompts}
    for batch in pack(answers, **options):
        updater.add(batch, targets(answers), version=0)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-6) for name in one)


def with_routes(answers: tuple[Trajectory, ...], change: Callable[[np.ndarray], np.ndarray]) -> tuple[Trajectory, ...]:
    """The same answers with altered records: what a bug would leave."""
    altered: list[Trajectory] = []
    for one in answers:
        assert one.routes is not None
        altered.append(dataclasses.replace(one, routes=change(one.routes.copy())))
    return tuple(altered)


def run(model: MiMoModel, batch: MicroBatch, routes: Tensor | None) -> Tensor:
    return model(
        batch.token_ids_BT,
        position_ids_BT=batch.position_ids_BT,
        document_ids_BT=batch.document_ids_BT,
        routed_experts_BTLk=routes,
    ).routed_experts.long()


def test_1_one_row_per_token_fed_and_none_for_the_last() -> None:
    """A dummy row for the last token would be replayed as if it had been chosen."""
    for one in sampled():
        assert one.routes is not None
        assert len(one.routes) == len(one.prompt.token_ids) + len(one.token_ids) - 1 == one.num_inputs
    one = sampled()[0]
    assert one.routes is not None
    completion = Completion(
        token_ids=one.token_ids,
        text="",
        finish_reason="stop",
        logprobs=tuple(one.logprobs_R.tolist()),
        routed_experts=np.concatenate((one.routes, one.routes[:1] * 0)),
    )
    with pytest.raises(TrainingError, match="routes of"):
        Trajectory.from_completion(one.prompt, completion)


def test_2_every_token_and_layer_is_covered_and_a_gap_is_refused() -> None:
    """Fails closed: a token without a record must never be routed natively in silence."""
    batches = pack(sampled(), max_tokens=4096, num_experts=EXPERTS)
    for batch in batches:
        assert batch.num_unrouted == 0
        assert torch.equal(batch.has_routes_BT, batch.document_ids_BT >= 0)
    assert sum(batch.num_tokens for batch in batches) == sum(one.num_inputs for one in sampled())
    model = load_model(folder())
    updater = PolicyUpdater(
        model,
        MasterAdamW(model.named_parameters()),
        rl_recipe().loss,
        Algorithm.GRPO,
        rollout=rl_recipe().rollout,
        num_tokens=420,
    )
    known = batches[0].has_routes_BT.clone()
    known[0, 3] = False
    holes = dataclasses.replace(batches[0], has_routes_BT=known)
    with pytest.raises(TrainingError, match="no recorded experts"):
        updater.add(holes, targets(sampled()), version=0)
    missing = (dataclasses.replace(sampled()[0], routes=None), *sampled()[1:])
    with pytest.raises(TrainingError, match="11 of 12 trajectories have routes"):
        pack(missing, max_tokens=4096)


def test_3_drafting_changes_no_record() -> None:
    """Rejected drafts leave no rows, heads no experts: same tokens, log-probabilities and routes, bit for bit."""
    for one, other in zip(sampled(3), sampled(0), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs_R.tolist() == other.logprobs_R.tolist()
        assert one.routes is not None
        assert other.routes is not None
        assert one.routes.tolist() == other.routes.tolist()
    assert any(one.draft.acceptance_length > 1.2 for one in sampled(3))


def test_4_cold_prefix_hit_and_next_turn_record_the_same() -> None:
    """A cached beginning brings its routes along, and a later turn's records contain the earlier turn's."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=True, routed_experts=True)
    engine = Engine(folder(), weights="int8")
    prompt = list(sampled()[0].prompt.token_ids)
    cold = engine.generate([prompt], params)[0]
    hit = engine.generate([prompt], params)[0]
    assert hit.num_cached_tokens > 0
    assert (hit.token_ids, hit.logprobs) == (cold.token_ids, cold.logprobs)
    assert hit.routed_experts is not None
    assert cold.routed_experts is not None
    assert hit.routed_experts.tolist() == cold.routed_experts.tolist()
    turn = prompt + list(cold.token_ids) + prompt
    later = engine.generate([turn], params)[0]
    assert later.num_cached_tokens >= len(prompt)
    alone = Engine(folder(), weights="int8", prefix_cache_bytes=0).generate([turn], params)[0]
    assert later.routed_experts is not None
    assert alone.routed_experts is not None
    assert later.routed_experts.tolist() == alone.routed_experts.tolist()
    assert later.routed_experts[: len(cold.routed_experts)].tolist() == cold.routed_experts.tolist()


def test_5_teachers_choose_their_own_experts() -> None:
    """A teacher that replays the student's experts says something else."""
    recipes = [TeacherRecipe(domain="logic", folder=str(base_folder()))]
    teachers = Teachers(recipes, start=folder(), dtype=torch.float32, device=torch.device("cpu"))
    (batch,) = pack(sampled(), max_tokens=4096, num_experts=EXPERTS)
    assert batch.routes_BTLk is not None
    other = dataclasses.replace(batch, routes_BTLk=(batch.routes_BTLk + 5) % EXPERTS)
    views = [teachers.view("logic", each, Signal.SAMPLED, 4).logprobs_N for each in (batch, other)]
    assert torch.equal(*views)
    # What it would be: experts that another model chose change the teacher's opinion.
    model = load_model(folder())
    assert not torch.equal(run(model, batch, batch.routes_BTLk), run(model, other, other.routes_BTLk))


def test_6_padding_is_no_expert_and_expert_0_is_no_padding() -> None:
    """What stands at places without a token changes nothing; a recorded expert 0 is replayed like any other."""
    (batch,) = pack(sampled(), max_tokens=4096, num_experts=EXPERTS)
    assert batch.routes_BTLk is not None
    garbage = torch.where(
        batch.has_routes_BT[..., None, None], batch.routes_BTLk, torch.full_like(batch.routes_BTLk, 3)
    )
    model = load_model(folder())
    hidden = [
        model(
            batch.token_ids_BT,
            position_ids_BT=batch.position_ids_BT,
            document_ids_BT=batch.document_ids_BT,
            routed_experts_BTLk=routes,
        ).hidden_BTD[batch.has_routes_BT]
        for routes in (batch.routes_BTLk, garbage)
    ]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)
    zeros = with_routes(sampled(), lambda routes: np.zeros_like(routes) + np.arange(routes.shape[-1], dtype=np.uint8))
    (batch,) = pack(zeros, max_tokens=4096, num_experts=EXPERTS)
    assert batch.num_unrouted == 0
    chosen = run(model, batch, batch.routes_BTLk)
    assert bool((chosen[batch.has_routes_BT][..., 0] == 0).all())
    # Padding loads no expert more than others.
    assert batch.routes_BTLk is not None
    counts = torch.bincount(batch.routes_BTLk[~batch.has_routes_BT].flatten(), minlength=EXPERTS)
    assert int(counts.max()) - int(counts.min()) <= batch.routes_BTLk[0, 0].numel()


def test_7_replayed_experts_outside_the_local_choice_teach_the_router() -> None:
    """Scores taken from what is left after the local choice would give them weight 0 and no gradient."""
    moe = load_model(folder()).config.moe
    assert moe is not None
    router = Router(32, moe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    x_ND = torch.randn(1, 32, generator=generator)
    native = set(router(x_ND).experts_Nk[0].tolist())
    others = [expert for expert in range(moe.num_experts) if expert not in native][: moe.num_experts_per_token]
    weights = router(x_ND, torch.tensor([others])).weights_Nk
    assert bool((weights > 0).all())
    weights[0, 0].backward()
    assert router.weight.grad is not None
    assert all(float(router.weight.grad[expert].abs().sum()) > 0 for expert in others)


def test_8_order_of_micro_batches_and_recomputation_keep_rows_with_their_tokens() -> None:
    """Rows that are paired with other tokens give other gradients; so does a bug that shifts them by one."""
    reference = gradients(sampled())
    backwards = list(range(NUM_ANSWERS))[::-1]
    assert same(reference, gradients(sampled(), max_tokens=256, order=backwards))
    shifted = with_routes(sampled(), lambda routes: np.roll(routes, 1, axis=0))
    assert not same(reference, gradients(shifted))
    model = load_model(folder())
    (batch,) = pack(sampled(), max_tokens=4096, num_experts=EXPERTS)

    def hidden(ids: Tensor) -> Tensor:
        return model(
            ids,
            position_ids_BT=batch.position_ids_BT,
            document_ids_BT=batch.document_ids_BT,
            routed_experts_BTLk=batch.routes_BTLk,
        ).hidden_BTD

    grads: list[Tensor] = []
    for recompute in (False, True):
        model.zero_grad()
        out = checkpoint(hidden, batch.token_ids_BT, use_reentrant=False) if recompute else hidden(batch.token_ids_BT)
        assert isinstance(out, Tensor)
        out[batch.has_routes_BT].square().sum().backward()
        grads.append(torch.cat([router.weight.grad.flatten() for router in model.routers()]))  # type: ignore[union-attr]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_answers_that_share_their_prompt_teach_the_same() -> None:
    """Catches a prompt's gradient that misses an answer, a head that looks into another answer, an answer that is left
    out where a row is full, and prompts with other routes that are shared all the same."""
    answers = sampled(prompts=3, group=4)
    reference = gradients(answers)
    assert any("mtp_heads" in name for name in reference)
    for max_tokens in (512, 4096):
        assert same(reference, gradients(answers, max_tokens=max_tokens, share_prompts=True))
    apart = sum(batch.num_tokens for batch in pack(answers, max_tokens=4096, num_experts=EXPERTS))
    batches = pack(answers, max_tokens=512, num_experts=EXPERTS, share_prompts=True)
    assert sorted(index for batch in batches for index in batch.order) == list(range(12))
    saved = sum(len(one.prompt.token_ids) - 4 for one in answers[::4])  # of each prompt, once for every other answer
    rows = sum(len(batch.token_ids_BT) for batch in batches)
    assert apart - 3 * saved <= sum(batch.num_tokens for batch in batches) <= apart - 3 * saved + (rows - 1) * saved
    first, *others = answers[:4]
    assert first.routes is not None
    moved = dataclasses.replace(first, routes=(first.routes + 1) % EXPERTS)
    (batch,) = pack([moved, *others], max_tokens=4096, num_experts=EXPERTS, share_prompts=True)
    assert len(batch.document_ids_BT.unique()) == 3  # the one, the three, padding
    shuffled = with_routes(answers, lambda routes: np.roll(routes, 1, axis=0))
    assert not same(reference, gradients(shuffled, share_prompts=True))


def test_replay_uses_exactly_the_recorded_sets() -> None:
    """All (token, layer) sets are equal with replay; without it some differ, as 8-bit weights choose otherwise."""
    model = load_model(folder())
    (batch,) = pack(sampled(), max_tokens=4096, num_experts=EXPERTS)
    assert route_difference(run(model, batch, batch.routes_BTLk), batch) == 0.0
    native = route_difference(run(model, batch, None), batch)
    assert native is not None
    assert native > 0.0


def test_records_are_one_byte_per_layer_and_choice() -> None:
    """At most layers x top_k bytes per token."""
    config = load_model(folder()).config
    assert config.moe is not None
    for one in sampled():
        assert one.routes is not None
        assert one.routes.nbytes == one.num_inputs * config.num_moe_layers * config.moe.num_experts_per_token
