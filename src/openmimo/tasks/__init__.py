"""Verifiable domains: problem generators with worked answers, and their graders."""

from openmimo.tasks.baselines import constant_baseline, task_baseline
from openmimo.tasks.problem import ANSWER_MARK, Problem, Task, extract_answer, in_test
from openmimo.tasks.registry import SPLITS, domains, find_task, grade_response, sample_problem, tasks

__all__ = [
    "ANSWER_MARK",
    "SPLITS",
    "Problem",
    "Task",
    "constant_baseline",
    "domains",
    "extract_answer",
    "find_task",
    "grade_response",
    "in_test",
    "sample_problem",
    "task_baseline",
    "tasks",
]
