"""The see-saw between skills: reinforcement learning in one domain after the other, beside MOPD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openmimo.reproduce import students
from openmimo.reproduce.story import DOMAINS, CurvePoint, Scores, Story, mean


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Learning in one domain; the points' tokens count from the beginning of all stages."""

    domain: str
    curve: tuple[CurvePoint, ...]

    @property
    def change(self) -> Scores:
        """What the stage did to each domain."""
        first, last = self.curve[0].scores, self.curve[-1].scores
        return {domain: last[domain] - first[domain] for domain in DOMAINS}


@dataclass(frozen=True, kw_only=True)
class Seesaw:
    """The stages of sequential learning and MOPD's curve. `lost` is, by domain, how far the end is below its best."""

    stages: tuple[Stage, ...]
    mopd: tuple[CurvePoint, ...]
    lost: Scores
    mopd_lost: Scores


def measure_seesaw(story: Story, *, seed: int) -> Seesaw:
    """Make what is missing: the runs of Table 7 with this seed."""
    mopd = story.student(seed)
    stages: list[Stage] = []
    before = 0
    for domain, run in zip(DOMAINS, students.sequential_rl(story, seed, mopd.sampled_tokens), strict=True):
        curve = tuple(
            CurvePoint(step=p.step, sampled_tokens=before + p.sampled_tokens, scores=p.scores) for p in run.curve
        )
        stages.append(Stage(domain=domain, curve=curve))
        before += run.sampled_tokens
    points = [point for stage in stages for point in stage.curve]
    return Seesaw(stages=tuple(stages), mopd=mopd.curve, lost=lost(points), mopd_lost=lost(mopd.curve))


def lost(points: Sequence[CurvePoint]) -> Scores:
    """By domain, the best score on the way minus the last."""
    return {d: max(point.scores[d] for point in points) - points[-1].scores[d] for d in DOMAINS}


def seesaw_rows(seesaw: Seesaw) -> tuple[list[str], list[list[str]]]:
    """What each stage changed, in points; then what was lost of each domain's best, and MOPD's."""
    header = ["", *DOMAINS, "mean at the end"]
    rows = [
        [
            f"RL in {stage.domain}",
            *(f"{100 * stage.change[domain]:+.1f}" for domain in DOMAINS),
            f"{100 * mean(stage.curve[-1].scores):.1f}",
        ]
        for stage in seesaw.stages
    ]
    rows.append(["lost of its best: sequential RL", *(f"{-100 * seesaw.lost[d]:.1f}" for d in DOMAINS), ""])
    end = f"{100 * mean(seesaw.mopd[-1].scores):.1f}"
    rows.append(["lost of its best: MOPD", *(f"{-100 * seesaw.mopd_lost[d]:.1f}" for d in DOMAINS), end])
    return header, rows


def seesaw_figures(seesaw: Seesaw) -> dict[str, Any]:
    """All figures, as JSON takes them."""
    return {**asdict(seesaw), "changes": [dict(stage.change) for stage in seesaw.stages]}
