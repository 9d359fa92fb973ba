"""What rollout routing replay (R3) repairs: trainer against low-precision sampler, and learning where that matters.

First the mismatch of one policy in several sampling precisions, with and without replay, before any update. Then
reinforcement learning with and without replay at a learning rate where the difference shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from openmimo.config.rl import OWN_START, Algorithm, RLRecipe, TeacherRecipe
from openmimo.reproduce.story import CurvePoint, Story
from openmimo.rl.loop import PolicyRun
from openmimo.train.plots import read_metrics

# What the sampler computes with: invariant fp32 on the trainer's own path, then formats that round more and more.
EXACT = "exact"
PRECISIONS = (EXACT, "bf16", "int8", "fp8", "int4")
# Steps whose answers a precision is judged by. What differs is in few tokens, so both ways look at all of them at once.
PROBE_STEPS = 4
ALL_TOKENS = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Trainer against sampler on the same answers: with replay, and when the trainer's routers choose themselves.

    `kl` in nats a token; `extreme` shares of tokens with a ratio beyond 2; `routes` shares of router decisions with
    another set of experts; `worst` the greatest difference of log-probabilities with replay.
    """

    precision: str
    kl: float
    native_kl: float
    extreme: float
    native_extreme: float
    routes: float
    native_routes: float
    worst: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class LearningArm:
    """Reinforcement learning with or without replay: rewards, gradient norms and mismatch of every seed's steps."""

    replay: bool
    seeds: tuple[int, ...]
    rewards: tuple[tuple[float, ...], ...]
    grad_norms: tuple[tuple[float, ...], ...]
    kls: tuple[tuple[float, ...], ...]
    extremes: tuple[tuple[float, ...], ...]
    curves: tuple[tuple[CurvePoint, ...], ...]

    @property
    def last_reward(self) -> float:
        """Mean over the seeds and the last tenth of the steps."""
        return statistics.mean(statistics.mean(each[-max(1, len(each) // 10) :]) for each in self.rewards)

    @property
    def worst_reward(self) -> float:
        """The same for the seed that does worst."""
        return min(statistics.mean(each[-max(1, len(each) // 10) :]) for each in self.rewards)


@dataclass(frozen=True, kw_only=True)
class R3Report:
    """Both measurements; `learning` is empty where only the mismatch was asked for."""

    gaps: tuple[Gap, ...]
    learning: tuple[LearningArm, ...]
    learning_rate: float
    domain: str


def measure_r3(
    story: Story,
    *,
    domain: str,
    precisions: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    learning_rate: float,
    minibatches: int,
    weights: str,
) -> R3Report:
    """Make what is missing. With `steps` 0 nothing learns. Learning clips nothing and masks nothing, so that what the
    mismatch does is seen; `minibatches` updates are made of a step's answers.
    """
    recipe = story.teacher_recipe(domain)
    gaps = tuple(_gap(story, recipe, precision) for precision in precisions)
    bare = replace(recipe.loss, clip_low=0.0, clip_high=0.0, ratio_low=1e-6, ratio_high=1e6)
    optimizer = replace(recipe.optimizer, peak_lr=learning_rate, final_lr=learning_rate)
    learning: list[LearningArm] = []
    for replay in (False, True) if steps else ():
        runs: list[tuple[list[dict[str, Any]], tuple[CurvePoint, ...]]] = []
        for seed in seeds:
            changed = replace(
                recipe,
                seed=seed,
                steps=steps,
                token_budget=0,
                minibatches=minibatches,
                loss=bare,
                optimizer=optimizer,
                rollout=replace(recipe.rollout, replay=replay, weights=weights),
            )
            run = story.policy(f"r3-{'replay' if replay else 'native'}-{seed}", changed)
            runs.append((read_metrics(run.folder), run.curve))
        learning.append(_arm(replay, seeds, runs))
    return R3Report(gaps=gaps, learning=tuple(learning), learning_rate=learning_rate, domain=domain)


def r3_rows(report: R3Report) -> tuple[list[str], list[list[str]]]:
    """The mismatch: a row per precision."""
    header = [
        "sampled in",
        "KL native",
        "KL replay",
        "ratio > 2 native",
        "replay",
        "routes differ native",
        "replay",
        "worst",
    ]
    rows = [
        [
            gap.precision,
            f"{gap.native_kl:.2e}",
            f"{gap.kl:.2e}",
            f"{gap.native_extreme:.3%}",
            f"{gap.extreme:.3%}",
            f"{gap.native_routes:.2%}",
            f"{gap.routes:.2%}",
            f"{gap.worst:.2g}",
        ]
        for gap in report.gaps
    ]
    return header, rows


def learning_rows(report: R3Report) -> tuple[list[str], list[list[str]]]:
    """The learning: a row per arm."""
    header = ["", "seeds", "steps", "reward at first", "reward at last", "worst seed", "largest gradient", "mean KL"]
    rows = [
        [
            "with replay" if arm.replay else "without",
            str(len(arm.seeds)),
            str(len(arm.rewards[0])),
            f"{statistics.mean(each[0] for each in arm.rewards):.1%}",
            f"{arm.last_reward:.1%}",
            f"{arm.worst_reward:.1%}",
            f"{max(chain(*arm.grad_norms), default=0.0):.3g}",
            f"{statistics.mean(chain(*arm.kls)) if any(arm.kls) else 0.0:.2e}",
        ]
        for arm in report.learning
    ]
    return header, rows


def r3_figures(report: R3Report) -> dict[str, Any]:
    """All figures, as JSON takes them."""
    return asdict(report)


def _gap(story: Story, recipe: RLRecipe, precision: str) -> Gap:
    """A policy that does not move samples in one precision. Its own start teaches it, so that every answer counts."""
    exact = precision == EXACT
    rollout = replace(recipe.rollout, exact=exact, replay=True, weights=recipe.rollout.weights if exact else precision)
    still = replace(recipe.optimizer, peak_lr=1e-12, final_lr=1e-12, weight_decay=0.0)
    name = f"r3-gap-{precision.replace(' ', '-')}"
    domain = recipe.sources[0].domain
    probe = replace(
        recipe,
        name=name,
        algorithm=Algorithm.MOPD,
        teachers=(TeacherRecipe(domain=domain, folder=OWN_START),),
        steps=PROBE_STEPS,
        rollout=rollout,
        optimizer=still,
        minibatches=1,
        micro_batch_tokens=ALL_TOKENS,
    )
    story.say(f"{name}: {PROBE_STEPS} steps without learning")
    run = PolicyRun(probe, story.folder / name, overwrite=True)
    run.probe_tokens = ALL_TOKENS
    records = [run.one_step() for _ in range(PROBE_STEPS)]
    run.grading.pool.close()

    def total(kind: str, figure: str, gather: Callable[[list[float]], float] = statistics.mean) -> float:
        found: list[Mapping[str, Any]] = [record[kind] for record in records if record.get(kind)]
        return gather([each[figure] or 0.0 for each in found])

    return Gap(
        precision=precision,
        kl=total("mismatch", "kl"),
        native_kl=total("native_mismatch", "kl"),
        extreme=total("mismatch", "extreme"),
        native_extreme=total("native_mismatch", "extreme"),
        routes=total("mismatch", "routes"),
        native_routes=total("native_mismatch", "routes"),
        worst=total("mismatch", "worst", max),
        num_tokens=sum(record["mismatch"]["num_tokens"] for record in records),
    )


def _arm(
    replay: bool, seeds: Sequence[int], runs: Sequence[tuple[list[dict[str, Any]], tuple[CurvePoint, ...]]]
) -> LearningArm:
    learnt = [[record for record in records if record["num_updates"]] for records, _ in runs]
    return LearningArm(
        replay=replay,
        seeds=tuple(seeds),
        rewards=tuple(tuple(record["reward"] for record in records) for records, _ in runs),
        grad_norms=tuple(tuple(record["grad_norm"] for record in records) for records in learnt),
        kls=tuple(tuple(record["mismatch"]["kl"] for record in records) for records in learnt),
        extremes=tuple(tuple(record["mismatch"]["extreme"] for record in records) for records in learnt),
        curves=tuple(curve for _, curve in runs),
    )
