"""What answers score that do not solve the problem, per task and level, and what the worked answer scores.

Usage: python benchmarks/task_baselines.py [--problems 400] [--levels 1 2] [--split test] [--seed 0]
Prints a table and one JSON line. Exits with 1 when a worked answer scores below 1, a junk answer or an echo above 0,
or a domain's constant reaches 0.35 at level 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from openmimo.tasks import SPLITS, Problem, constant_baseline, domains, grade_response, sample_problem, tasks
from openmimo.tasks import task_baseline as best_constant

HIGHEST_CONSTANT = 0.35
JUNK = ("answer: None", "answer: 0 0 0", "answer: yes", "answer: []", "I do not know.")


@dataclass(frozen=True)
class Row:
    """One task at one level; scores are means over problems, lengths are characters."""

    domain: str
    task: str
    level: int
    constant: float
    junk: float
    echo: float
    canonical: float
    prompt_characters: float
    solution_characters: float
    problems_per_second: float


def main() -> int:
    options = parse_options()
    rows = [
        measure(task.domain, task.name, level, options)
        for domain in domains()
        for task in tasks(domain)
        for level in task.levels
        if options.levels is None or level in options.levels
    ]
    constants = {
        domain: constant_baseline(domain, level=1, split=options.split, seed=options.seed) for domain in domains()
    }
    print_table(rows)
    print(json.dumps({"split": options.split, "constant_level_1": constants, "tasks": [asdict(row) for row in rows]}))
    clean = all(row.canonical == 1.0 and row.junk == 0.0 and row.echo == 0.0 for row in rows)
    return 0 if clean and max(constants.values()) < HIGHEST_CONSTANT else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=400, help="problems per task and level")
    parser.add_argument("--levels", type=int, nargs="+", default=None, help="only these levels")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def measure(domain: str, task: str, level: int, options: argparse.Namespace) -> Row:
    start = time.process_time()
    problems = [
        sample_problem(domain, split=options.split, level=level, seed=options.seed, index=index, task=task)
        for index in range(options.problems)
    ]
    seconds = time.process_time() - start
    return Row(
        domain=domain,
        task=task,
        level=level,
        constant=best_constant(problems),
        junk=max(mean_score(problems, lambda _, text=text: text) for text in JUNK),
        echo=mean_score(problems, lambda problem: f"{problem.prompt}\nanswer: {problem.prompt}"),
        canonical=mean_score(problems, lambda problem: problem.solution),
        prompt_characters=mean([len(problem.prompt) for problem in problems]),
        solution_characters=mean([len(problem.solution) for problem in problems]),
        problems_per_second=round(len(problems) / max(seconds, 1e-9)),
    )


def mean_score(problems: Sequence[Problem], respond: Callable[[Problem], str]) -> float:
    return mean([grade_response(problem, respond(problem)) for problem in problems])


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def print_table(rows: Sequence[Row]) -> None:
    print(f"{'domain':10} {'task':11} level constant  junk  echo canonical  prompt solution problems/s")
    for row in rows:
        print(
            f"{row.domain:10} {row.task:11} {row.level:5} {row.constant:8.3f} {row.junk:5.2f} {row.echo:5.2f} "
            f"{row.canonical:9.2f} {row.prompt_characters:7.0f} {row.solution_characters:8.0f} "
            f"{row.problems_per_second:10.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
