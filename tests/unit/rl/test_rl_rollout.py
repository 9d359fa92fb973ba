"""Prompts are dealt out, answered, parked, replaced and counted exactly once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rl_cases import base_folder, rl_recipe

from openmimo.config.rl import RLRecipe
from openmimo.engine import Engine
from openmimo.errors import ConfigError, TrainingError
from openmimo.rl.rollout import RolloutWorker
from openmimo.rl.scheduler import PromptScheduler
from openmimo.rl.trajectory import Group, Trajectory
from openmimo.text import ChatTemplate, Tokenizer


def make_worker(recipe: RLRecipe) -> RolloutWorker:
    """Rewards are a function of the answer's tokens, so that they differ within groups."""
    folder = base_folder() / "model"
    template = ChatTemplate(Tokenizer.load(folder))
    scheduler = PromptScheduler(recipe, lambda text: template.render([{"role": "user", "content": text}]))
    engine = Engine(folder, weights=recipe.rollout.weights, max_batch=recipe.rollout.max_batch)

    def grade(answers: Sequence[Trajectory]) -> list[Trajectory]:
        return [replace(one, reward=float(sum(one.token_ids) % 3 == 0)) for one in answers]

    return RolloutWorker(engine, scheduler, recipe, grade)


def numbers(groups: Sequence[Group]) -> list[int]:
    return [group[0].prompt.number for group in groups]


def contents(groups: Sequence[Group]) -> list[object]:
    return [(one.prompt.number, one.choice, one.token_ids, one.logprobs_R.tolist()) for g in groups for one in g]


def update(worker: RolloutWorker) -> None:
    """New weights, equal to the old ones: texts stay comparable, versions count."""
    engine = worker.sampler
    assert isinstance(engine, Engine)
    from openmimo.checkpoint import load_model

    engine.update_weights(load_model(base_folder() / "model"))


def test_a_step_has_its_groups_whole_and_in_order() -> None:
    worker = make_worker(rl_recipe())
    groups, stats = worker.collect(keeps_uniform=True)
    assert numbers(groups) == [0, 1, 2, 3]
    assert all([one.choice for one in group] == [0, 1, 2, 3] for group in groups)
    assert (stats.num_answers, stats.parked, stats.replaced, stats.staleness) == (16, 0, 0, 0)
    assert numbers(worker.collect(keeps_uniform=True)[0]) == [4, 5, 6, 7]


def test_answers_do_not_depend_on_the_batch() -> None:
    """The seed of a prompt makes its answers, whatever else is sampled beside it."""
    wide = make_worker(rl_recipe()).collect(keeps_uniform=True)[0]
    narrow = make_worker(rl_recipe(rollout={"max_batch": 3})).collect(keeps_uniform=True)[0]
    assert contents(wide) == contents(narrow)


def test_partial_rollouts_park_and_lose_nothing() -> None:
    """Over many steps with parking: every prompt once, every answer whole, versions never go back, none too old."""
    recipe = rl_recipe(rollout={"partial": True, "max_staleness": 2, "max_batch": 6})
    worker = make_worker(recipe)
    seen: Counter[int] = Counter()
    parked = mixed = 0
    for step in range(8):
        groups, stats = worker.collect(keeps_uniform=True)
        assert len(groups) == recipe.rollout.prompts
        parked += stats.parked
        for group in groups:
            seen[group[0].prompt.number] += 1
            for one in group:
                assert list(one.versions_R) == sorted(one.versions_R)
                assert step - int(one.versions_R[0]) <= recipe.rollout.max_staleness
                assert len(one.logprobs_R) == len(one.token_ids)
                mixed += int(one.versions_R[0] != one.versions_R[-1])
        update(worker)
    assert parked > 0
    assert mixed > 0
    assert set(seen.values()) == {1}
    state = worker.scheduler.state()
    assert state["num_prompts"] == len(seen) + len(worker.state()["flights"]) + len(worker.state()["finished"])
    assert sum(state["answers"]) == 4 * (len(seen) + len(worker.state()["finished"]))


def test_parked_answers_survive_a_checkpoint() -> None:
    """Saved through JSON in the middle of answers, a run goes on to the same answers, each once."""
    recipe = rl_recipe(rollout={"partial": True, "max_staleness": 4, "max_batch": 6})
    first = make_worker(recipe)
    done = [first.collect(keeps_uniform=True)[0]]
    saved = json.loads(json.dumps([first.scheduler.state(), first.state()]))
    assert saved[1]["flights"]
    assert any(part["token_ids"] for flight in saved[1]["flights"] for part in flight["open"])
    second = make_worker(recipe)
    second.scheduler.restore(saved[0])
    second.restore(saved[1])
    rest = {number: None for step in range(3) for number in numbers(second.collect(keeps_uniform=True)[0])}
    whole = make_worker(rl_recipe(rollout={"prompts": 20, "max_batch": 6})).collect(keeps_uniform=True)[0]
    assert not set(numbers(done[0])) & set(rest)
    again = make_worker(recipe)
    again.scheduler.restore(saved[0])
    again.restore(saved[1])
    texts = {group[0].prompt.number: contents([group]) for group in whole}
    for _ in range(3):
        for group in again.collect(keeps_uniform=True)[0]:
            one = group[0].prompt.number
            assert [entry[2] for entry in contents([group])] == [entry[2] for entry in texts[one]]  # type: ignore[index]


def test_uniform_groups_are_replaced_but_not_where_a_teacher_speaks() -> None:
    """Dynamic sampling draws others in their place, up to its allowance; with a teacher all stay."""
    recipe = rl_recipe(rollout={"resample": 2.0, "group_size": 2, "prompts": 6})
    plain = make_worker(rl_recipe(rollout={"group_size": 2, "prompts": 6})).collect(keeps_uniform=False)[0]
    uniform = sum(len({one.reward for one in group}) == 1 for group in plain)
    assert uniform > 0
    groups, stats = make_worker(recipe).collect(keeps_uniform=False)
    assert stats.replaced >= uniform or stats.replaced == 12
    assert sum(len({one.reward for one in group}) == 1 for group in groups) < uniform or stats.replaced == 12
    groups, stats = make_worker(recipe).collect(keeps_uniform=True)
    assert stats.replaced == 0
    assert numbers(groups) == list(range(6))


def test_shares_are_of_tokens_and_priorities_go_first() -> None:
    """A domain with long answers gets fewer prompts; among those behind, the higher priority comes first."""
    sources = [{"domain": "logic", "weight": 1.0}, {"domain": "math", "weight": 3.0}]
    worker = make_worker(rl_recipe(sources=sources))
    for _ in range(12):
        worker.collect(keeps_uniform=True)
    short, long = worker.scheduler.state()["tokens"]
    assert long / (short + long) == pytest.approx(0.75, abs=0.05)
    sources = [{"domain": "logic"}, {"domain": "math", "priority": 1}]
    scheduler = make_worker(rl_recipe(sources=sources)).scheduler
    assert scheduler.next().source == 1
    assert worker.scheduler.shares() == {"logic": 0.25, "math": 0.75}


def test_prompts_that_come_again_are_remembered_and_rest() -> None:
    """A finite source repeats; a problem that is always right or wrong makes room for the others."""
    worker = make_worker(rl_recipe(sources=[{"domain": "logic", "num_prompts": 6}]))
    drawn: Counter[int] = Counter()
    for _ in range(10):
        for group in worker.collect(keeps_uniform=True)[0]:
            drawn[group[0].prompt.index] += 1
            rate = worker.scheduler.pass_rate(0, group[0].prompt.index)
            assert rate is not None
            assert 0.0 <= rate <= 1.0
    assert set(drawn) == set(range(6))
    state = json.loads(json.dumps(worker.scheduler.state()))
    other = make_worker(rl_recipe(sources=[{"domain": "logic", "num_prompts": 6}])).scheduler
    other.restore(state)
    assert [other.next() for _ in range(5)] == [worker.scheduler.next() for _ in range(5)]


def test_a_state_of_other_sources_is_refused() -> None:
    state = make_worker(rl_recipe()).scheduler.state()
    other = make_worker(rl_recipe(sources=[{"domain": "logic"}, {"domain": "math"}])).scheduler
    with pytest.raises(TrainingError, match="1 sources, the recipe 2"):
        other.restore(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "mopd"}, "have no teacher"),
        ({"teachers": [{"domain": "logic", "folder": "self"}]}, "takes no teachers"),
        ({"loss": {"ratio_low": 1.5}}, "both sides of 1"),
        ({"rollout": {"top_p": 1.5}}, "at most 1"),
        ({"sources": []}, "sources is empty"),
        ({"sources": [{"domain": "logic", "split": "tset"}]}, "did you mean 'test'"),
        ({"rollout": {"promts": 3}}, "did you mean 'prompts'"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rl_recipe(**changes)
