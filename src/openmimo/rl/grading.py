"""Rewards for a step's answers, from the graders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from openmimo.config.rl import GraderRecipe
from openmimo.rl.graders import GraderPool
from openmimo.rl.trajectory import Trajectory


class Grading:
    """Grades groups as they finish, and counts the time that took."""

    def __init__(self, recipe: GraderRecipe) -> None:
        self.pool = GraderPool(recipe.workers, timeout_s=recipe.timeout_s)
        self._seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.close()

    def grade(self, answers: Sequence[Trajectory]) -> list[Trajectory]:
        """The answers with their rewards, in order. An answer that was cut off is graded like any other."""
        began = time.perf_counter()
        grades = self.pool.grade_all([(one.prompt.problem, one.text) for one in answers])
        self._seconds += time.perf_counter() - began
        return [
            replace(one, reward=grade.score, grade_status=grade.status)
            for one, grade in zip(answers, grades, strict=True)
        ]

    def take_seconds(self) -> float:
        """Seconds spent since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
