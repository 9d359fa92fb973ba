"""All tasks by domain, and the one function that makes any problem of the two splits."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from openmimo.errors import TaskError, nearest
from openmimo.tasks.algebra import GreatestDivisor, Linear
from openmimo.tasks.arithmetic import Addition, Chain, Product, Subtraction
from openmimo.tasks.circuits import Circuit
from openmimo.tasks.expressions import Expand
from openmimo.tasks.knights import Knights
from openmimo.tasks.orderings import Ordering
from openmimo.tasks.problem import Problem, Task, in_test, number_from
from openmimo.tasks.programs import Predict, Synthesize
from openmimo.tasks.python_programs import PythonFunction
from openmimo.tasks.retrieval import AllNeedles, Needle, Needles, Pairs, Recall, Recite, Track

SPLITS = ("train", "test")
MAX_REDRAWS = 10_000


@lru_cache(maxsize=1)
def _registry() -> dict[str, tuple[Task, ...]]:
    everything = (
        Addition(), Subtraction(), Product(), Linear(), Chain(), GreatestDivisor(), Expand(),
        Predict(), Synthesize(), PythonFunction(),
        Circuit(), Ordering(), Knights(),
        Needle(), Needles(), AllNeedles(), Track(), Pairs(), Recall(), Recite(),
    )  # fmt: skip
    names = dict.fromkeys(task.domain for task in everything)
    return {domain: tuple(task for task in everything if task.domain == domain) for domain in names}


def domains() -> tuple[str, ...]:
    """The names of all domains."""
    return tuple(_registry())


def tasks(domain: str, *, level: int | None = None) -> tuple[Task, ...]:
    """The tasks of a domain, or those of them that have `level`.

    Raises: TaskError for an unknown domain, or a level that none of its tasks has.
    """
    if domain not in _registry():
        raise TaskError(f"unknown domain {domain!r}; {nearest(domain, _registry())}")
    return _registry()[domain] if level is None else _with_level(domain, level)


@lru_cache(maxsize=256)
def _with_level(domain: str, level: int) -> tuple[Task, ...]:
    found = tuple(task for task in _registry()[domain] if level in task.levels)
    if not found:
        highest = max(task.levels[-1] for task in _registry()[domain])
        raise TaskError(f"domain {domain!r} has no level {level}; its levels are 1-{highest}")
    return found


def find_task(domain: str, name: str) -> Task:
    """The task of that name.

    Raises: TaskError for an unknown domain or name.
    """
    for task in tasks(domain):
        if task.name == name:
            return task
    raise TaskError(f"unknown task {name!r} in {domain!r}; {nearest(name, (t.name for t in tasks(domain)))}")


def sample_problem(domain: str, *, split: str, level: int, seed: int, index: int, task: str | None = None) -> Problem:
    """Problem number `index` of a stream that depends on the arguments only, not on earlier calls or the process.

    Tasks of the domain are equally likely unless `task` names one. Problems are drawn until the key of one falls into
    the split, so no key is ever in both.
    Raises: TaskError for an unknown domain, task, level or split.
    Cost: about ten draws for the test split, one for the train split.
    """
    if split not in SPLITS:
        raise TaskError(f"unknown split {split!r}; expected 'train' or 'test'")
    rng = Random(number_from(f"{domain}/{task or ''}/{split}/{level}/{seed}/{index}"))
    if task is None:
        choices = tasks(domain, level=level)
        chosen = choices[int(rng.random() * len(choices))]
    else:
        chosen = find_task(domain, task)
        chosen.check_level(level)
    want_test = split == "test"
    for _ in range(MAX_REDRAWS):
        problem = chosen.generate(rng, level)
        if in_test(problem.key) == want_test:
            return problem
    raise TaskError(f"no {split} problem of {chosen.name!r} in {MAX_REDRAWS} draws; its keys are too few")


def grade_response(problem: Problem, response: str) -> float:
    """The score in [0, 1] of a response, by the task that made the problem.

    Raises: TaskError when the problem's domain or task is unknown.
    """
    return find_task(problem.domain, problem.task).grade(problem, response)
