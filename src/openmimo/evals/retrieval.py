"""Retrieval by task and length of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from openmimo import tasks
from openmimo.engine import Engine, SamplingParams
from openmimo.errors import RequestError
from openmimo.evals.accuracy import chat_renderer
from openmimo.tasks import Problem

DOMAIN = "retrieval"
# Tasks whose text grows with the level: one fact, several, all; chains of values; pairs.
LONG_TASKS = ("needle", "needles", "needles4", "track", "pairs")


@dataclass(frozen=True, kw_only=True)
class RetrievalCell:
    """One task at one level. `num_tokens` is the mean length of a prompt, `constant` what a fixed guess would get."""

    task: str
    level: int
    num_tokens: float
    accuracy: float
    constant: float
    num_problems: int


def measure_retrieval(
    engine: Engine,
    *,
    names: Sequence[str] = LONG_TASKS,
    levels: Sequence[int] = (1, 2, 3, 4),
    num_problems: int,
    seed: int = 0,
    split: str = "test",
    max_tokens: int = 96,
    render: Callable[[str], list[int]] | None = None,
) -> list[RetrievalCell]:
    """Answer `num_problems` problems of every task and level, greedily. `render` is that of `evaluate_domains`.

    Raises: TaskError for a task or level that there is not; RequestError without a tokenizer, without anything to
    answer, or for a text that is longer than the engine takes.
    """
    if num_problems < 1 or not names or not levels:
        raise RequestError(f"got {num_problems} problems of tasks {list(names)} at levels {list(levels)}; give some")
    render = render or chat_renderer(engine)
    cells: list[RetrievalCell] = []
    for level in levels:
        for name in names:
            problems = [_problem(name, level, split, seed, index) for index in range(num_problems)]
            prompts = [render(problem.prompt) for problem in problems]
            done = engine.generate(prompts, SamplingParams(max_tokens=max_tokens))
            scores = [tasks.grade_response(p, answer.text) for p, answer in zip(problems, done, strict=True)]
            cells.append(
                RetrievalCell(
                    task=name,
                    level=level,
                    num_tokens=mean(map(len, prompts)),
                    accuracy=mean(scores),
                    constant=tasks.task_baseline(problems),
                    num_problems=num_problems,
                )
            )
    return cells


def retrieval_rows(cells: Sequence[RetrievalCell], native_tokens: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows: tasks down, lengths across; with `native_tokens`, lengths as multiples of it."""
    names, levels, shares = retrieval_grid(cells)
    header = ["", *(f"level {level}" for level in levels)]
    rows = [[name, *(f"{share:.1%}" for share in line)] for name, line in zip(names, shares, strict=True)]
    lengths = prompt_lengths(cells)
    rows.append(["tokens of a prompt", *(f"{length:,.0f}" for length in lengths)])
    if native_tokens:
        rows.append(["times the native length", *(f"{length / native_tokens:.1f}" for length in lengths)])
    return header, rows


def retrieval_grid(cells: Sequence[RetrievalCell]) -> tuple[list[str], list[int], list[list[float]]]:
    """Tasks, levels, and the accuracy of each at each."""
    names, levels = (list(dict.fromkeys(each)) for each in zip(*((c.task, c.level) for c in cells), strict=True))
    by_place = {(cell.task, cell.level): cell.accuracy for cell in cells}
    return names, levels, [[by_place[name, level] for level in levels] for name in names]


def prompt_lengths(cells: Sequence[RetrievalCell]) -> list[float]:
    """Mean tokens of a prompt, level by level."""
    levels = dict.fromkeys(cell.level for cell in cells)
    return [mean(cell.num_tokens for cell in cells if cell.level == level) for level in levels]


def _problem(name: str, level: int, split: str, seed: int, index: int) -> Problem:
    return tasks.sample_problem(DOMAIN, split=split, level=level, seed=seed, index=index, task=name)
