"""The report's Figure 6 in small: how fast a student learns from outcomes alone, from teachers alone, and from both."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from openmimo.config.rl import Algorithm
from openmimo.reproduce.story import DOMAINS, STUDENT_EVERY, CurvePoint, Story, mean

OUTCOME, TEACHERS, BOTH = "outcome reward alone", "MOPD without outcome reward", "MOPD"
ARMS = (OUTCOME, TEACHERS, BOTH)
# The share of the way from the base to the teachers at which a student counts as having reached them.
REACHED = 0.95
# Answers to one prompt where outcomes are all there is: with the student's two, most groups are of equal rewards.
OUTCOME_GROUP = 4


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn. `curves` has a curve per seed; `reached` the first step from which the mean curve is there."""

    name: str
    curves: tuple[tuple[CurvePoint, ...], ...]
    reached: int | None
    final: float

    def mean_curve(self) -> list[tuple[int, float]]:
        """Step and score, the mean over domains and seeds, at the steps that all seeds have."""
        by_step: dict[int, list[float]] = {}
        for curve in self.curves:
            for point in curve:
                by_step.setdefault(point.step, []).append(mean(point.scores))
        return [(step, statistics.mean(v)) for step, v in sorted(by_step.items()) if len(v) == len(self.curves)]


@dataclass(frozen=True, kw_only=True)
class Figure6:
    """The arms, and where base and teachers stand on the same problems.

    `factor` is the steps of outcomes alone over MOPD's, a lower bound where they never get there (`factor_is_bound`).
    """

    arms: tuple[Arm, ...]
    base: float
    teachers: float
    factor: float | None
    factor_is_bound: bool


def measure_figure6(story: Story, *, seeds: Sequence[int], outcome_steps: int) -> Figure6:
    """Make what is missing. Outcomes alone run for `outcome_steps`, the other arms as the student's recipe says.

    Outcomes alone learn with the teachers' recipe, whose learning rate was found for that, from as many answers a step
    as the student, in groups of OUTCOME_GROUP.
    """
    reference = [story.teacher(domain).curve for domain in DOMAINS]
    teachers = statistics.mean(curve[-1].scores[d] for d, curve in zip(DOMAINS, reference, strict=True))
    base = statistics.mean(mean(curve[0].scores) for curve in reference)
    wanted = base + REACHED * (teachers - base)
    arms: list[Arm] = []
    for name in ARMS:
        curves = tuple(_curve(story, name, seed, outcome_steps) for seed in seeds)
        arm = Arm(name=name, curves=curves, reached=None, final=0.0)
        points = arm.mean_curve()
        arms.append(replace(arm, reached=first_reached(points, wanted), final=points[-1][1]))
    mopd, outcome = arms[ARMS.index(BOTH)], arms[ARMS.index(OUTCOME)]
    bound = outcome.reached is None
    steps = outcome_steps if outcome.reached is None else outcome.reached
    factor = None if mopd.reached is None else steps / max(1, mopd.reached)
    return Figure6(arms=tuple(arms), base=base, teachers=teachers, factor=factor, factor_is_bound=bound)


def first_reached(points: Sequence[tuple[int, float]], wanted: float) -> int | None:
    """The first step whose score is at least `wanted`."""
    return next((step for step, score in points if score >= wanted), None)


def figure6_figures(figure: Figure6) -> dict[str, Any]:
    """All figures, as JSON takes them."""
    return asdict(figure)


def figure6_rows(figure: Figure6) -> tuple[list[str], list[list[str]]]:
    """A row per arm."""
    header = ["", "seeds", "steps", "final mean", f"steps to {REACHED:.0%} of the way"]
    rows = [
        [
            arm.name,
            str(len(arm.curves)),
            str(arm.mean_curve()[-1][0]),
            f"{100 * arm.final:.1f}",
            "not reached" if arm.reached is None else str(arm.reached),
        ]
        for arm in figure.arms
    ]
    return header, rows


def _curve(story: Story, name: str, seed: int, outcome_steps: int) -> tuple[CurvePoint, ...]:
    if name == BOTH:
        return story.student(seed).curve
    student = story.student_recipe(seed)
    if name == TEACHERS:
        recipe = replace(student, loss=replace(student.loss, outcome_weight=0.0))
        return story.policy(f"teachers-alone-{seed}", recipe, every=STUDENT_EVERY).curve
    answers = student.rollout.prompts * student.rollout.group_size
    recipe = replace(
        story.recipe.teacher,
        algorithm=Algorithm.GRPO,
        model=student.model,
        sources=student.sources,
        rollout=replace(student.rollout, prompts=max(1, answers // OUTCOME_GROUP), group_size=OUTCOME_GROUP),
        seed=seed,
        steps=outcome_steps,
        token_budget=0,
    )
    return story.policy(f"outcome-alone-{seed}", recipe, every=STUDENT_EVERY).curve
