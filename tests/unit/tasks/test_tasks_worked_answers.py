"""Every step of a worked answer is true, and every answer is the only one, by oracles that read the prompt alone."""

from __future__ import annotations

import re
from fractions import Fraction
from math import gcd
from random import Random

import pytest
from task_oracles import (
    circuit_values,
    facts,
    gate_value,
    numbers,
    orders,
    problems,
    run_list_program,
    said,
    value,
    worlds,
)

from openmimo.tasks import domains, grade_response, tasks

LEVELS = (1, 2, 3, 4, 5)
EVERY = [(domain, task.name, level) for domain in domains() for task in tasks(domain) for level in task.levels]


@pytest.mark.parametrize(("domain", "task", "level"), EVERY)
def test_worked_answer_is_graded_right_and_its_neighbours_wrong(domain: str, task: str, level: int) -> None:
    """Catches generators and graders that disagree, graders that say yes, and empty answers."""
    # A wrong Python function is started to be found wrong, which takes its time.
    for problem in problems(domain, task, level, 10 if task == "python" else 40 if level < 6 else 5):
        assert (problem.domain, problem.task, problem.level) == (domain, task, level)
        assert problem.solution.endswith(f"\nanswer: {problem.answer}")
        assert problem.answer.strip() == problem.answer != ""
        assert grade_response(problem, problem.solution) == 1.0
        for wrong in (problem.answer[:-1], problem.answer + "9", changed(problem.answer), "", "None"):
            if task == "synthesize" and level > 1 and same_program(wrong, problem.answer):
                continue
            if task == "python" and same_function(wrong, problem.answer):
                continue
            assert grade_response(problem, f"answer: {wrong}") == 0.0, wrong


def same_program(one: str, other: str) -> bool:
    """Whether two programs agree on many lists, such as `take 2 | reverse` and `take 2 | rotate`."""
    rng = Random(0)
    lists = [[rng.randrange(31) for _ in range(rng.randrange(1, 9))] for _ in range(60)]
    try:
        return all(run_list_program(one, values)[-1] == run_list_program(other, values)[-1] for values in lists)
    except (KeyError, ValueError, IndexError):
        return False


def same_function(one: str, other: str) -> bool:
    """Whether two of our own Python functions agree on many lists, as `x > 12` and `x > 13` do for even x."""
    rng = Random(0)
    lists = [[rng.randrange(-90, 150) for _ in range(rng.randrange(80))] for _ in range(300)]
    names: list[dict[str, object]] = [{}, {}]
    try:
        for text, space in zip((one, other), names, strict=True):
            exec(text, space)
        first, second = (space["f"] for space in names)
        return all(first(values) == second(values) for values in lists)  # type: ignore[operator]
    except (SyntaxError, NameError, KeyError, ValueError):
        return False


def changed(answer: str) -> str:
    """The answer with another last digit or letter, or another list operation."""
    swaps = {"reverse": "rotate", "rotate": "reverse", "evens": "odds", "odds": "evens", "sort": "max", "double": "min"}
    last = answer.split()[-1]
    if last in swaps:
        return answer.removesuffix(last) + swaps[last]
    place = max(i for i, char in enumerate(answer) if char.isalnum())
    char = answer[place]
    other = str((int(char) + 1) % 10) if char.isdigit() else "z"
    return answer[:place] + other + answer[place + 1 :]


def cases(*names: str) -> list[tuple[str, int]]:
    """(task, level) for all levels of the mathematical tasks called `names`, of all of them without names."""
    return [(task.name, level) for task in tasks("math") for level in task.levels if not names or task.name in names]


@pytest.mark.parametrize(("task", "level"), cases())
def test_every_equation_of_a_maths_answer_holds(task: str, level: int) -> None:
    """Catches a wrong carry, borrow, product or quotient in any line."""
    for problem in problems("math", task, level, 100):
        steps = facts(problem.solution)
        assert steps
        for left, right in steps:
            assert value(left, Fraction(7)) == value(right, Fraction(7)), (problem.solution, left, right)


@pytest.mark.parametrize(("task", "level"), cases("add", "subtract", "multiply", "chain"))
def test_arithmetic_answers_are_right(task: str, level: int) -> None:
    """Catches answers that do not follow from the prompt."""
    for problem in problems("math", task, level, 60):
        assert value(problem.prompt.removesuffix("=?")) == int(problem.answer)


@pytest.mark.parametrize("task", ["add", "subtract"])
def test_columns_copy_the_operands_and_build_the_result(task: str) -> None:
    """Catches columns in the wrong order, digits of other numbers and results that grow wrongly."""
    for problem in problems("math", task, 1, 100):
        columns = problem.solution.split("\n")[:-1]
        left, right = re.findall(r"\d+", problem.prompt)
        assert "".join(column[0] for column in columns) == left[::-1]
        assert "".join(column[2] for column in columns) == right[::-1]
        results = [column.partition(">")[2] for column in columns]
        assert results == [problem.answer[-n:] for n in (1, 2, 3)]


@pytest.mark.parametrize("level", LEVELS)
def test_equations_have_the_given_root(level: int) -> None:
    """Catches a wrong root, and equations that any x solves."""
    for problem in problems("math", "linear", level, 100):
        left, right = problem.prompt.removeprefix("solve ").split("=")
        root = Fraction(int(problem.answer))
        assert value(left, root) == value(right, root)
        assert value(left, root + 1) != value(right, root + 1)


def test_greatest_divisors_agree_with_the_library() -> None:
    """Catches Euclid's steps that stop early."""
    for level in (2, 3, 4, 5):
        for problem in problems("math", "gcd", level, 50):
            assert gcd(*numbers(problem.prompt)) == int(problem.answer)


@pytest.mark.parametrize("level", LEVELS)
def test_predictions_show_every_list_on_the_way(level: int) -> None:
    """Catches a wrong intermediate list, result or fact about one number."""
    for problem in problems("code", "predict", level, 100):
        start, _, program = problem.prompt.removeprefix("run:").partition("|")
        lists = run_list_program(program, numbers(start))
        assert numbers(problem.answer) == lists[-1]
        for step, expected in zip(problem.solution.split("\n")[0].split("|"), lists, strict=True):
            assert numbers(step[step.rindex("[") :]) == expected
        for left, right in facts(problem.solution):
            assert value(left) == value(right)
        for number, verdict in re.findall(r"(\d+) (yes|no)", problem.solution):
            keep = int(number) % 2 == (0 if "evens" in program else 1)
            assert keep == (verdict == "yes") or ("evens" in program and "odds" in program)


@pytest.mark.parametrize("level", LEVELS)
def test_programs_meet_their_examples_by_another_interpreter(level: int) -> None:
    """Catches examples that the true program does not give, and comparisons of other numbers."""
    for problem in problems("code", "synthesize", level, 60):
        pairs = [pair.split(" to ") for pair in problem.prompt.removeprefix("find:").split(";")]
        assert len(pairs) == (2 if level == 1 else 3)
        for before, after in pairs:
            assert run_list_program(problem.answer, numbers(before))[-1] == numbers(after)
        before, after = (numbers(text) for text in pairs[0])
        seen = numbers(problem.solution.split(" so ")[0])
        if level == 1:
            assert seen == [len(before), len(after), before[0], after[0], before[-1], after[-1]]
        assert seen[:1] == [len(before)]
        assert all(value(left) == value(right) for left, right in facts(problem.solution))


@pytest.mark.parametrize("level", LEVELS)
def test_circuits_are_evaluated_gate_by_gate(level: int) -> None:
    """Catches a wrong gate table, wire or order."""
    for problem in problems("logic", "circuit", level, 60):
        wires = circuit_values(problem.prompt)
        for name, bit in re.findall(r"\b([a-z])([01])\b", problem.solution):
            assert wires[name] == int(bit)
        lines = re.findall(r"= \w([01]) (\w+) \w([01]): \w([01])", problem.solution)
        assert len(lines) == 2 * level + 2 == len(problem.answer.split())
        assert all(gate_value(kind, int(a), int(b)) == int(out) for a, kind, b, out in lines)


@pytest.mark.parametrize(("level", "count"), [(1, 60), (2, 30), (3, 6), (4, 1)])
def test_exactly_one_order_fits(level: int, count: int) -> None:
    """Catches statements that leave the order open or contradict it, and verdicts that are not true."""
    for problem in problems("logic", "order", level, count):
        found = orders(problem.prompt)
        assert [" > ".join(order) for order in found] == [problem.answer]
        right, left = problem.solution.split("\n")[0].removeprefix("right ").split("; left ")
        assert set(right.split()) == set(found[0][1:])
        verdicts = dict(zip(left.split()[::2], left.split()[1::2], strict=True))
        assert [name for name, verdict in verdicts.items() if verdict == "no"] == [found[0][0]]
        assert set(verdicts.values()) <= {"yes", "no"}


@pytest.mark.parametrize("level", LEVELS)
def test_exactly_one_assignment_of_roles_fits(level: int) -> None:
    """Catches puzzles with two solutions or none, and false verdicts in the worked answer."""
    for problem in problems("logic", "knights", level, 60):
        (world,) = worlds(problem.prompt)
        given = dict(part.split() for part in problem.answer.split(", "))
        assert given == {name: "knight" if knight else "knave" for name, knight in world.items()}
        tries = problem.solution.split("\n")[:-1]
        assert [line.endswith(" ok") for line in tries] == [False] * (len(tries) - 1) + [True]
        for line in tries:
            _check_try(line, list(world))


def _check_try(line: str, people: list[str]) -> None:
    roles = dict(re.findall(r"([A-Z][a-z]+) (knight|knave)(?= says|,|:)", line))
    assert set(roles) == set(people)
    supposed = {name: role == "knight" for name, role in roles.items()}
    claims = re.findall(r"([A-Z][a-z]+) (knight|knave) says ([A-Za-z ]+?) (true|false)", line)
    assert claims
    for speaker, _, claim, truth in claims:
        assert said(speaker, claim, supposed) == (truth == "true"), line
    fits = all((truth == "true") == supposed[speaker] for speaker, _, _, truth in claims)
    assert fits == line.endswith("ok"), line
