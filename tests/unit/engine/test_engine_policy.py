"""The automatic number of drafts, in a world where every step's time is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from openmimo.engine.drafting import REST, CostModel, DraftPolicy


@dataclass
class Answer:
    """What the policy knows of an answer."""

    draft_limit: int = 3
    num_drafts: int = 0
    tokens_since_draft: int = 0
    acceptance: list[float] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0])


def run(
    shares: list[float], *, per_token: float, per_draft: float, num_steps: int, num_answers: int = 1, seed: int = 0
) -> tuple[float, float, list[float]]:
    """Tokens per second of an adaptive run and of plain decoding, and the mean number of drafts per answer.

    A step of n tokens takes 1 + per_token * n seconds, a head pass per_draft; times are noisy. Answer i's drafts are
    kept with probability shares[i].
    """
    rng = np.random.default_rng(seed)
    policy = DraftPolicy(3)
    answers = [Answer() for _ in range(num_answers)]
    seconds, tokens, drafts = 0.0, 0, np.zeros(num_answers)
    for _ in range(num_steps):
        policy.choose(answers, 0)  # type: ignore[arg-type]
        drafting = sum(answer.num_drafts > 0 for answer in answers)
        if drafting:
            policy.draft_cost.observe(drafting, per_draft * rng.uniform(0.9, 1.3))
            seconds += per_draft
        fed = num_answers + sum(answer.num_drafts for answer in answers)
        policy.observe_step(fed, (1 + per_token * fed) * rng.uniform(0.95, 1.2))
        seconds += 1 + per_token * fed
        for place, (answer, share) in enumerate(zip(answers, shares, strict=True)):
            kept = 0
            while kept < answer.num_drafts and rng.random() < share:
                kept += 1
            if answer.num_drafts:
                policy.learn(answer, answer.num_drafts, kept)  # type: ignore[arg-type]
            answer.histogram[0] += 1
            answer.tokens_since_draft = 0 if answer.num_drafts else answer.tokens_since_draft + 1
            drafts[place] += answer.num_drafts
            tokens += 1 + kept
    return tokens / seconds, num_answers / (1 + per_token * num_answers), (drafts / num_steps).tolist()


@pytest.mark.parametrize("per_token", [0.02, 0.15, 0.6])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_never_much_slower_than_plain_and_near_the_best_fixed_number(per_token: float, share: float) -> None:
    """Catches drafting that goes on although it does not pay, and drafting that stops although it does."""
    adaptive, plain, _ = run([share], per_token=per_token, per_draft=0.3, num_steps=6000)
    fixed = [sum(share**i for i in range(n + 1)) / (1 + per_token * (1 + n) + (0.3 if n else 0.0)) for n in range(4)]
    assert fixed[0] == pytest.approx(plain)
    assert adaptive >= 0.98 * plain
    assert adaptive >= 0.93 * max(fixed)


def test_answers_beside_each_other_get_drafts_by_their_own_acceptance() -> None:
    """Catches one number for all: the predictable answers should draft, the others not."""
    *_, drafts = run([0.95, 0.95, 0.05, 0.05], per_token=0.2, per_draft=0.05, num_steps=4000, num_answers=4)
    assert min(drafts[:2]) > 2.5
    assert max(drafts[2:]) < 0.3


def test_a_change_for_the_better_is_noticed() -> None:
    """Catches drafting that is switched off for good."""
    policy, answer = DraftPolicy(3), Answer()
    rng, on = np.random.default_rng(0), []
    for step in range(9000):
        policy.choose([answer], 0)  # type: ignore[arg-type]
        drafts = answer.num_drafts
        if drafts:
            policy.draft_cost.observe(1, 0.2)
        policy.observe_step(1 + drafts, 1 + 0.15 * drafts)
        kept = 0
        while kept < drafts and rng.random() < (0.0 if step < 3000 else 0.95):
            kept += 1
        if drafts:
            policy.learn(answer, drafts, kept)  # type: ignore[arg-type]
        answer.histogram[0] += 1
        on.append(drafts > 0)
    assert np.mean(on[500:3000]) < 0.05
    assert np.mean(on[5000:]) > 0.9


def test_without_measurements_likely_drafts_are_verified() -> None:
    """Catches a server that never drafts because every step of it feeds some prompt."""
    policy, answers = DraftPolicy(3), [Answer(acceptance=[0.9, 0.8, 0.4]), Answer(acceptance=[0.3, 0.9, 0.9])]
    counts = []
    for _ in range(40):
        policy.choose(answers, 0)  # type: ignore[arg-type]
        counts.append([answer.num_drafts for answer in answers])
    assert counts[0] == [0, 0]
    assert all(count == [2, 0] for count in counts[4:])


def known(times: dict[int, float]) -> CostModel:
    cost = CostModel()
    for size, seconds in times.items():
        for _ in range(4):
            cost.observe(size, seconds)
    return cost


def test_costs_between_measured_sizes_lie_between_and_outliers_count_little() -> None:
    """Catches costs that are made up, and one interrupted step that decides for hundreds of others."""
    cost = known({8: 4.0, 4: 2.0})
    assert [cost.seconds(size) for size in (0, 1, 4, 5, 8, 20)] == [0.0, 2.0, 2.0, 2.5, 4.0, 4.0]
    assert [cost.knows(size) for size in (3, 4, 5, 6, 8, 9)] == [False, True, True, True, True, False]
    cost.observe(4, 100.0)
    assert cost.seconds(4) == pytest.approx(2.1)


def test_an_old_time_gives_way_to_a_new_one() -> None:
    """Catches plain decoding, measured seldom, that is still believed to be as slow as the machine once was."""
    cost = known({4: 2.0, 8: 4.0})
    for _ in range(20):
        cost.observe(8, 2.0)
    cost.observe(4, 1.0)
    assert cost.seconds(4) == pytest.approx(1.5)


def test_larger_steps_are_not_believed_to_be_faster() -> None:
    """Catches drafts that are verified only because the times of two sizes were measured in different moments."""
    cost = known({4: 2.0, 8: 5.0, 10: 3.0, 16: 6.0})
    cost.observe(20, 1.0)  # seen once: not known
    assert [cost.rising().seconds(size) for size in (4, 8, 10, 16)] == [2.0, 3.0, 3.0, 6.0]


def test_decisions_rest_while_no_answer_drafts() -> None:
    """Catches a decision per step that costs as much as the drafts it decides against, and rest that never ends."""
    policy, answers = DraftPolicy(3), [Answer(acceptance=[0.01] * 3) for _ in range(4)]
    policy.step_cost, policy.draft_cost = known({4: 1.0, 16: 4.0}), known({4: 0.5})
    policy.choose(answers, 0)  # type: ignore[arg-type]
    rests = [policy.rests() for _ in range(REST + 1)]
    assert rests == [True] * REST + [False]
    for answer in answers:
        answer.acceptance = [0.99] * 3
    policy.step_cost = known({4: 1.0, 16: 1.1})
    policy.choose(answers, 0)  # type: ignore[arg-type]
    assert [answer.num_drafts for answer in answers] == [3] * 4
    assert not policy.rests()
