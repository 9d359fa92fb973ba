"""The report's Table 7 in small: the base, the best teacher and the MOPD student in every domain; and other students.

A student's recovered headroom is (student - base) / (best teacher - base), the mean over the domains.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmimo.reproduce import students
from openmimo.reproduce.story import DOMAINS, Exam, FinishedRun, Scores, Story, mean

MOPD = "MOPD"


@dataclass(frozen=True, kw_only=True)
class Student:
    """One way to one model: its scores, the mean over its seeds, and the tokens that a seed sampled.

    `spread` is the sample deviation over the seeds, 0 with one. `by_seed` has each seed's scores.
    """

    name: str
    scores: Scores
    greedy: Scores
    spread: Scores
    by_seed: tuple[Scores, ...]
    sampled_tokens: int
    recovered: float

    @property
    def mean(self) -> float:
        return mean(self.scores)

    @property
    def worst(self) -> float:
        """The weakest domain's score."""
        return min(self.scores.values())


@dataclass(frozen=True, kw_only=True)
class Table7:
    """Scores of problems drawn at temperature 1, and greedily; `best` is the best teacher's, domain by domain."""

    base: Exam
    teachers: Mapping[str, Exam]
    best: Scores
    best_greedy: Scores
    students: tuple[Student, ...]
    num_problems: int
    teacher_tokens: int

    @property
    def mopd(self) -> Student:
        return next(student for student in self.students if student.name == MOPD)


def measure_table7(story: Story, *, seeds: Sequence[int], num_problems: int, baselines: bool) -> Table7:
    """Make what is missing, and examine. Without `baselines` MOPD is the only student.

    Those that sample get as many tokens as an MOPD run. Reinforcement learning, which needs no teachers, is also run
    with the teachers' tokens on top, with the first seed.
    """
    base = story.exam(story.base().model, num_problems)
    runs = {domain: story.teacher(domain) for domain in DOMAINS}
    teachers = {domain: story.exam(run.model, num_problems) for domain, run in runs.items()}
    best = {domain: max(exam.drawn[domain] for exam in teachers.values()) for domain in DOMAINS}
    best_greedy = {domain: max(exam.greedy[domain] for exam in teachers.values()) for domain in DOMAINS}
    teacher_tokens = sum(run.sampled_tokens for run in runs.values())

    def student(name: str, made: Sequence[tuple[Path, int]]) -> Student:
        exams = [story.exam(model, num_problems) for model, _ in made]
        drawn = [exam.drawn for exam in exams]
        scores = _mean_scores(drawn)
        gains = [(scores[d] - base.drawn[d]) / (best[d] - base.drawn[d]) for d in DOMAINS if best[d] > base.drawn[d]]
        return Student(
            name=name,
            scores=scores,
            greedy=_mean_scores([exam.greedy for exam in exams]),
            spread={d: statistics.stdev([each[d] for each in drawn]) if len(drawn) > 1 else 0.0 for d in DOMAINS},
            by_seed=tuple(drawn),
            sampled_tokens=round(statistics.mean(tokens for _, tokens in made)),
            recovered=statistics.mean(gains) if gains else 0.0,
        )

    mopd = [story.student(seed) for seed in seeds]
    made = [student(MOPD, [_outcome(run) for run in mopd])]
    if baselines:
        budget = round(statistics.mean(run.sampled_tokens for run in mopd))
        ways: dict[str, Callable[[int], tuple[Path, int]]] = {
            "SFT on teachers' answers": lambda seed: _imitated(story, seed, budget, only_right=False),
            "SFT on their right answers": lambda seed: _imitated(story, seed, budget, only_right=True),
            "mixed RL": lambda seed: _outcome(students.mixed_rl(story, seed, budget)),
            "sequential RL": lambda seed: _sequential(story, seed, budget),
        }
        made += [student("linear merge", [(students.averaged(story), 0)])]
        made += [student("task arithmetic", [(students.task_arithmetic(story), 0)])]
        made += [student(name, [way(seed) for seed in seeds]) for name, way in ways.items()]
        longer = students.mixed_rl(story, seeds[0], budget + teacher_tokens, name="mixed-rl-longer")
        made += [student("mixed RL, teachers' tokens too", [_outcome(longer)])]
    return Table7(
        base=base,
        teachers=teachers,
        best=best,
        best_greedy=best_greedy,
        students=tuple(made),
        num_problems=num_problems,
        teacher_tokens=teacher_tokens,
    )


def table7_rows(table: Table7) -> tuple[list[str], list[list[str]]]:
    """Header and rows: domains down, models across, as in the report; then mean, headroom and tokens."""
    header = ["", "before", "best teacher", *(student.name for student in table.students)]
    base, made = table.base, table.students
    drawn = [base.drawn, table.best, *(student.scores for student in made)]
    greedy = [base.greedy, table.best_greedy, *(student.greedy for student in made)]
    rows = [
        [domain, *map(_percent, (base.drawn[domain], table.best[domain]))]
        + [_percent(student.scores[domain], student.spread[domain]) for student in made]
        for domain in DOMAINS
    ]
    rows += [
        ["mean", *(_percent(mean(each)) for each in drawn)],
        ["worst domain", *(_percent(min(each.values())) for each in drawn)],
        ["mean, greedy", *(_percent(mean(each)) for each in greedy)],
        ["headroom recovered", "", "", *(f"{student.recovered:.0%}" for student in made)],
        ["tokens sampled", "", f"{table.teacher_tokens:,}", *(f"{student.sampled_tokens:,}" for student in made)],
    ]
    return header, rows


def table7_figures(table: Table7) -> dict[str, Any]:
    """All figures, as JSON takes them."""
    return {
        "num_problems": table.num_problems,
        "base": {"drawn": dict(table.base.drawn), "greedy": dict(table.base.greedy)},
        "teachers": {d: {"drawn": dict(e.drawn), "greedy": dict(e.greedy)} for d, e in table.teachers.items()},
        "teacher_tokens": table.teacher_tokens,
        "students": {
            s.name: {
                "drawn": dict(s.scores),
                "greedy": dict(s.greedy),
                "spread": dict(s.spread),
                "by_seed": [dict(scores) for scores in s.by_seed],
                "sampled_tokens": s.sampled_tokens,
                "recovered": s.recovered,
            }
            for s in table.students
        },
    }


def _outcome(run: FinishedRun) -> tuple[Path, int]:
    return run.model, run.sampled_tokens


def _imitated(story: Story, seed: int, budget: int, *, only_right: bool) -> tuple[Path, int]:
    return students.imitation(story, seed, budget, only_right=only_right).model, budget


def _sequential(story: Story, seed: int, budget: int) -> tuple[Path, int]:
    runs = students.sequential_rl(story, seed, budget)
    return runs[-1].model, sum(run.sampled_tokens for run in runs)


def _mean_scores(scores: Sequence[Scores]) -> Scores:
    return {domain: statistics.mean(each[domain] for each in scores) for domain in DOMAINS}


def _percent(share: float, spread: float = 0.0) -> str:
    return f"{100 * share:.1f}" + (f" ±{100 * spread:.1f}" if spread else "")
