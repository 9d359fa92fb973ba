"""Graders, the list language's limits, and the computed baselines."""

from __future__ import annotations

import pytest
from task_oracles import problems

from openmimo.tasks import (
    Problem,
    constant_baseline,
    domains,
    extract_answer,
    grade_response,
    sample_problem,
    task_baseline,
    tasks,
)
from openmimo.tasks.listlang import (
    MAX_LIST_LENGTH,
    MAX_OPERATIONS,
    MAX_VALUE,
    ProgramError,
    format_program,
    parse_list,
    parse_program,
    run_program,
)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("answer: 5", "5"),
        ("  answer:5  ", "5"),
        ("answer: 4\nanswer: 5\nend", "5"),
        ("answer: 5\r\n", "5"),
        ("answer:  a   b ", "a b"),
        ("answer: [1, 2 ,3]", "[1,2,3]"),
        ("the answer: 5", None),
        ("Answer: 5", None),
        ("5", None),
        ("", None),
        ("answer:", ""),
        ("answer: 1\nthe answer: 2", "1"),
    ],
)
def test_the_last_answer_line_counts(response: str, answer: str | None) -> None:
    """Catches a first line that wins, answers inside other lines, and lost or invented spaces."""
    assert extract_answer(response) == answer


def test_grading_is_strict_beyond_spaces() -> None:
    """Catches graders that accept more than one way to write a number."""
    problem = sample_problem("math", split="train", level=1, seed=0, index=0, task="add")
    number = problem.answer
    assert grade_response(problem, f"work\n answer:  {number} ") == 1.0
    for wrong in (f"0{number}", f"+{number}", f"{number}.0", " ".join(number), f"{number} {number}", f"{number}="):
        assert grade_response(problem, f"answer: {wrong}") == 0.0
    assert grade_response(problem, f"answer: {number}\nanswer: 0") == 0.0
    assert grade_response(problem, problem.prompt) == 0.0


def synthesis(prompt: str, answer: str) -> Problem:
    return Problem(prompt, f"answer: {answer}", answer, "code", "synthesize", 1, f"synthesize {answer}")


def test_any_right_program_counts_and_a_lucky_one_does_not() -> None:
    """Catches grading by text, and grading by the shown examples alone."""
    problem = synthesis("find: [1,2,3] to [3,4,5]; [0,4,2,6] to [2,6,4,8]", "add 2")
    for program in ("add 2", "add 1|add 1", " add  3 | sub 1", "reverse | add 2 | reverse"):
        assert grade_response(problem, f"answer: {program}") == 1.0
    lucky = synthesis("find: [1,2,3] to [1,2,3]", "sort")
    assert grade_response(lucky, "answer: sort") == 1.0
    for program in ("add 0", "take 3", "add 3", "add", "add two", "sort 1", "import os", "", "|", "add 2 |"):
        assert grade_response(lucky, f"answer: {program}") == 0.0


def test_huge_responses_are_graded() -> None:
    """Catches a search that is quadratic in the response (it would run for minutes) and unbounded programs."""
    problem = synthesis("find: [1,2,3] to [3,4,5]", "add 2")
    for response in (
        "answer:" * 300_000,
        "answer: " + "add 1 | " * 200_000,
        "answer: add " + "9" * 1_000_000,
        "\n" * 10**6,
    ):
        assert grade_response(problem, response) == 0.0


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("revers", "did you mean 'reverse'"),
        ("__import__", "unknown operation"),
        ("add", "takes 1 numbers, got 0"),
        ("reverse 2", "takes 0 numbers, got 1"),
        ("add 1 2", "got 2"),
        ("add -1", "whole number"),
        ("add 100", "whole number"),
        ("add ²", "whole number"),
        ("add ٣", "whole number"),
        ("add 1e3", "whole number"),
        ("", "missing"),
        ("reverse |", "missing"),
        (" | ".join(["sort"] * (MAX_OPERATIONS + 1)), "at most"),
        ("reverse" + " " * 500, "characters"),
    ],
)
def test_unreadable_programs_are_refused(program: str, message: str) -> None:
    """Catches a parser that lets through what the language does not have."""
    with pytest.raises(ProgramError, match=message):
        parse_program(program)


def test_runs_stay_within_the_limits() -> None:
    """Catches lists and numbers that grow without bound."""
    with pytest.raises(ProgramError, match="numbers; at most"):
        run_program(parse_program("push 1"), [0] * MAX_LIST_LENGTH)
    with pytest.raises(ProgramError, match="beyond"):
        run_program(parse_program("double"), [MAX_VALUE])
    with pytest.raises(ProgramError, match="beyond"):
        run_program(parse_program("sub 1"), [-MAX_VALUE])
    with pytest.raises(ProgramError, match="at most"):
        run_program((), range(10**6))
    assert run_program(parse_program("max | min | drop 5 | max | rotate | sort"), [3, 1]) == ()


def test_programs_and_lists_read_back() -> None:
    """Catches text that the parser does not read as it was written."""
    program = parse_program(" drop 1|add 2 |reverse")
    assert format_program(program) == "drop 1 | add 2 | reverse"
    assert parse_program(format_program(program)) == program
    assert parse_list(" [5, -2,7] ") == (5, -2, 7)
    assert parse_list("[]") == ()
    for bad in ("5,2", "[5,,2]", "[5 2]", "[²]", "[99999999]", "[" + "1," * 10**6 + "1]"):
        with pytest.raises(ProgramError):
            parse_list(bad)


@pytest.mark.parametrize("domain", domains())
def test_constants_score_low_at_level_one(domain: str) -> None:
    """Catches a task that one fixed answer or a fixed guess solves."""
    assert constant_baseline(domain, level=1) < 0.35
    for task in tasks(domain, level=1):
        assert task_baseline(list(problems(domain, task.name, 1, 300, "test"))) < 0.35


@pytest.mark.parametrize(("domain", "task"), [(domain, task.name) for domain in domains() for task in tasks(domain)])
def test_constants_score_low_at_higher_levels(domain: str, task: str) -> None:
    """Catches statements that are no longer shuffled, or another short cut that only harder problems have."""
    for level in (2, 3, 5):
        assert task_baseline(list(problems(domain, task, level, 80))) < 0.4


def test_baselines_find_what_a_guess_scores() -> None:
    """Catches a baseline that is low because its guesses are malformed."""
    assert 0.2 < task_baseline(list(problems("logic", "knights", 1, 400))) < 0.33
    assert 0.1 < task_baseline(list(problems("logic", "order", 1, 400))) < 0.3
    assert 0.1 < task_baseline(list(problems("code", "synthesize", 1, 400))) < 0.25
    assert 0.2 < task_baseline(list(problems("retrieval", "needle", 1, 400))) < 0.33
    same = [sample_problem("math", split="train", level=1, seed=0, index=0, task="add")] * 10
    assert task_baseline(same) == 1.0
