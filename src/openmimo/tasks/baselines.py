"""What an answer scores that does not look at the problem: the floor under every accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from openmimo.tasks.problem import ANSWER_MARK, Problem
from openmimo.tasks.registry import grade_response, sample_problem, tasks

NUM_PROBLEMS = 400
NUM_CONSTANTS = 5


@lru_cache(maxsize=256)
def constant_baseline(
    domain: str, *, level: int, split: str = "test", seed: int = 0, num_problems: int = NUM_PROBLEMS
) -> float:
    """The best score without solving anything, averaged over the domain's tasks at this level.

    Each task contributes its best constant answer or its best fixed guess, so a model that merely recognises the task
    and always says the same cannot do better. Computed on `num_problems` problems per task.
    Raises: TaskError for an unknown domain, level or split.
    """
    scores = [
        task_baseline(
            [
                sample_problem(domain, split=split, level=level, seed=seed, index=index, task=task.name)
                for index in range(num_problems)
            ]
        )
        for task in tasks(domain, level=level)
    ]
    return sum(scores) / len(scores)


def task_baseline(problems: Sequence[Problem]) -> float:
    """The best of the most frequent answers and of the task's fixed guesses, on problems of one task."""
    common = [answer for answer, _ in Counter(p.answer for p in problems).most_common(NUM_CONSTANTS)]
    constants = [_mean_score(problems, [answer] * len(problems)) for answer in common]
    task = next(t for t in tasks(problems[0].domain) if t.name == problems[0].task)
    rows = [task.guesses(problem) for problem in problems]
    width = min(map(len, rows))
    guesses = [_mean_score(problems, [row[i] for row in rows]) for i in range(width)]
    return max(constants + guesses)


def _mean_score(problems: Sequence[Problem], answers: Sequence[str]) -> float:
    scores = [grade_response(p, f"{ANSWER_MARK} {a}") for p, a in zip(problems, answers, strict=True)]
    return sum(scores) / len(scores)
