"""Laws of tasks for any seed and any text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from openmimo.tasks import domains, extract_answer, grade_response, in_test, sample_problem
from openmimo.tasks.listlang import (
    MAX_LIST_LENGTH,
    MAX_VALUE,
    OPERATIONS,
    ProgramError,
    format_program,
    parse_program,
    run_program,
)
from openmimo.tasks.problem import tidy

PROBLEMS = st.builds(
    sample_problem,
    st.sampled_from(domains()),
    split=st.sampled_from(["train", "test"]),
    level=st.integers(1, 5),
    seed=st.integers(-(2**70), 2**70),
    index=st.integers(0, 2**40),
)
STEPS = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 120)).map(
    lambda step: step[0] if step[1] > 99 else f"{step[0]} {step[1]}"
)


@settings(max_examples=60, deadline=None)
@given(PROBLEMS, st.sampled_from(["train", "test"]))
def test_canonical_answers_score_one_and_keys_follow_the_split(problem, split) -> None:
    """Catches seeds for which a generator fails or lands in the wrong split."""
    assert grade_response(problem, problem.solution) == 1.0
    assert grade_response(problem, f"{problem.prompt}\n{problem.solution}") == 1.0
    assert all(line.strip() for line in problem.solution.split("\n"))
    again = sample_problem(problem.domain, split=split, level=problem.level, seed=0, index=0, task=problem.task)
    assert in_test(again.key) == (split == "test")


@settings(max_examples=150, deadline=None)
@given(PROBLEMS, st.text(max_size=60), st.sampled_from(["", "answer: ", "\nanswer:"]))
def test_any_text_is_graded_and_only_the_answer_scores(problem, text, prefix) -> None:
    """Catches graders that fail on odd text or reward it."""
    score = grade_response(problem, prefix + text)
    if score and problem.task not in ("synthesize", "python", "expand"):
        assert extract_answer(prefix + text) == tidy(problem.answer)
    assert score in (0.0, 1.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, max_size=14), st.lists(st.integers(-(10**6), 10**6), max_size=70))
def test_the_interpreter_refuses_or_stays_within_its_limits(steps, values) -> None:
    """Catches any program that gets past the limits or raises something else."""
    try:
        program = parse_program(" | ".join(steps))
        assert parse_program(format_program(program)) == program
        result = run_program(program, values)
    except ProgramError:
        return
    assert len(result) <= MAX_LIST_LENGTH
    assert all(abs(number) <= MAX_VALUE for number in result)


@given(st.text(max_size=40))
def test_tidying_twice_changes_nothing(text) -> None:
    """Catches an answer that equals itself only before it is tidied."""
    assert tidy(tidy(text)) == tidy(text)
