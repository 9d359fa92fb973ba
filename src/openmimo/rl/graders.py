"""Graders in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from openmimo.tasks import Problem, grade_response


@dataclass(frozen=True, kw_only=True)
class Grade:
    ticket: int
    score: float
    seconds: float
    status: str = "ok"


class GraderPool:
    def __init__(self, num_workers: int = 0, *, timeout_s: float = 10.0) -> None:
        self.num_workers, self.timeout_s = num_workers, timeout_s

    def grade_all(self, pairs: Sequence[tuple[Problem, str]]) -> list[Grade]:
        grades: list[Grade] = []
        for ticket, (problem, response) in enumerate(pairs):
            began = time.perf_counter()
            score = grade_response(problem, response)
            grades.append(Grade(ticket=ticket, score=score, seconds=time.perf_counter() - began))
        return grades

    def close(self) -> None:
        pass
