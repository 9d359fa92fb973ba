"""Python functions as a task: worked answers against the words, and answers that want the score without the work."""

from __future__ import annotations

import json
import re

import pytest
from task_oracles import numbers, problems

from openmimo.errors import SandboxError
from openmimo.tasks import Problem, grade_response, python_programs
from openmimo.tasks.python_programs import LEVEL_VARIABLE, hidden_lists, outputs_of, program_text
from openmimo.tasks.sandbox import Level, available_level

pytestmark = pytest.mark.skipif(
    (available_level() or Level.LIMITED) < Level.FILTERED, reason="this machine cannot hold a program"
)
LEVELS = (2, 3, 4, 5)


def by_words(words: str, values: list[int]) -> object:
    """What a reader of the words would give."""
    keep, take, give = (part.partition(" ")[2] for part in words.split("; "))
    for condition in keep.split(" and "):
        n = numbers(condition)
        if "divisible" in condition:
            values = [x for x in values if not x % n[0]]
        elif "leave" in condition:
            values = [x for x in values if (x - n[0]) % n[1] == 0]
        else:
            values = [x for x in values if (x > n[0] if "above" in condition else x < n[0])]
    for change in take.split(", then "):
        (n,) = numbers(change)
        if "times" in change:
            values = [x * n for x in values]
        elif "plus" in change:
            values = [x + n for x in values]
        elif "minus the number" in change:
            values = [n - x for x in values]
        elif "distance" in change:
            values = [x - n if x > n else n - x for x in values]
        else:
            values = [x - n * (x // n) for x in values]
    return {
        "the sum": lambda: sum(values),
        "the largest, or 0": lambda: sorted([*values])[-1] if values else 0,
        "the smallest, or 0": lambda: sorted([*values])[0] if values else 0,
        "the list": lambda: values,
        "the list backwards": lambda: list(reversed(values)),
        "the sorted list": lambda: sorted(values),
        "the sum of the first 3": lambda: sum(x for i, x in enumerate(values) if i < 3),
        "every second one from the first": lambda: [x for i, x in enumerate(values) if i % 2 == 0],
        "the running sums": lambda: [sum(values[: i + 1]) for i in range(len(values))],
        "the differences of neighbours, later minus earlier": lambda: [
            values[i + 1] - values[i] for i in range(len(values) - 1)
        ],
    }[give]()


@pytest.mark.parametrize("level", LEVELS)
def test_worked_answers_and_examples_do_what_the_words_say(level: int) -> None:
    """Catches words, examples, code and grader that mean different functions."""
    for problem in problems("code", "python", level, 15):
        words = re.search(r"f\(xs\): (.*)\. f\(", problem.prompt)
        assert words is not None
        for values, value in re.findall(r"f\((\[[-0-9,]*\])\)=(\[[-0-9,]*\]|-?\d+)", problem.prompt):
            assert by_words(words[1], json.loads(values)) == json.loads(value)
        expected = json.dumps([by_words(words[1], values) for values in hidden_lists()])
        assert outputs_of(problem.answer) == expected
        assert grade_response(problem, f"answer: {problem.answer}  # the same") == 1.0
        # The line before the answer works the first example.
        line = problem.solution.split("\n")[-2]
        value = line.rpartition(" give ")[2]
        assert f"={value}, " in problem.prompt


def test_keys_are_many_and_conditions_have_no_order() -> None:
    """Catches test problems that training has seen with its conditions swapped."""
    for level in LEVELS:
        assert len({p.key for p in problems("code", "python", level, 500)}) > 480
    for problem in problems("code", "python", 4, 50):
        kept = re.findall(r"keep (.*?); take", problem.key)[0].split(" and ")
        assert kept == sorted(kept)


def test_bounds_that_mean_the_same_have_one_key() -> None:
    """Catches a test problem that differs from one of training by a bound between the same numbers."""
    even, change, finish = (
        python_programs._condition("divisible", 2),
        python_programs._change("plus", 1),
        python_programs.FINISHES[0],
    )
    for kind, bounds, other in (("above", (7, 6), 8), ("below", (7, 8), 9)):
        keys = [
            python_programs.Described((even, python_programs._condition(kind, bound)), (change,), finish).key
            for bound in (*bounds, other)
        ]
        assert keys[0] == keys[1] != keys[2]


DOUBLE = Problem(
    "", "", "none", "code", "python", 2, "python keep numbers above 5; take 2 times the number; give the sum"
)
RIGHT = "sum(2 * x for x in xs if x > 5)"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (f"answer: def f(xs): return {RIGHT}", 1.0),
        (f"answer: f = lambda xs: {RIGHT}", 1.0),
        (f"so\nanswer:\n```python\ndef f(xs):\n    return {RIGHT}\n```\nthat is all", 1.0),
        (f"answer:\n\n```\nimport math\nprint('hello')\ndef f(xs): return math.fsum([0]) and 0 or {RIGHT}\n```", 1.0),
        (f"answer: ```python\ndef f(xs): return {RIGHT}\n```", 1.0),
        (f"answer: def f(xs): return {RIGHT}\nanswer: def f(xs): return 0", 0.0),
        (f"def f(xs): return {RIGHT}", 0.0),
        (f"answer: {RIGHT}", 0.0),
        (f"answer: def g(xs): return {RIGHT}", 0.0),
        (f"answer: def f(xs): return float({RIGHT})", 0.0),
        (f"answer: def f(xs): return str({RIGHT})", 0.0),
        (f"answer: def f(xs): return {RIGHT} if xs else 1", 0.0),
        (f"answer: def f(xs): return {RIGHT} if len(xs) > 1 else 0", 0.0),
        ("answer:", 0.0),
        ("answer: def f(xs", 0.0),
        ("answer: def f(xs): return " + "1 + " * 2000 + "1", 0.0),
        ("answer:\n```python", 0.0),
    ],
)
def test_any_right_function_counts(response: str, score: float) -> None:
    """Catches grading by text, blocks that are not found, and answers that are nearly right."""
    assert grade_response(DOUBLE, response) == score


@pytest.mark.parametrize(
    "body",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "print('1.0'); return 1",
        "return sum(iter(int, 1))",
        "import json; json.dumps = lambda *_: 'true'; return 0",
        "import json; json.dumps = lambda *_: '1.0'; return 0",
        "global _outputs; _outputs = [True] * 999; return True",
        "import builtins; builtins.all = lambda *_: True; return 0",
        "return type('T', (int,), {'__eq__': lambda *_: True})(0)",
        "import sys; return sys.stdin.read()",
        "import os; os.write(1, b'\\n1.0\\n'); os._exit(0)",
        "import openmimo.tasks; return openmimo.tasks.python_programs.hidden_lists()",
        "return [f.f_locals for f in __import__('inspect').stack()]",
        "return float('nan')",
        "return [[]] * 10 ** 6",
        "return '\\ud800'",
        "import os; os.fork(); return 0",
        "return f(xs)",
    ],
)
def test_answers_that_only_want_the_score_get_none(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a grader that shares anything with what it grades."""
    monkeypatch.setattr(python_programs, "LIMITS", python_programs.Limits(seconds=0.5))
    assert grade_response(DOUBLE, f"answer: def f(xs): {body}") == 0.0


def test_a_text_runs_once_unless_it_took_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a busy moment that is remembered as a wrong answer, and groups that are run answer by answer."""
    runs: list[str] = []
    run = python_programs.run_program

    def counting(source: str, **options: object) -> object:
        runs.append(source)
        return run(source, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(python_programs, "run_program", counting)
    monkeypatch.setattr(python_programs, "LIMITS", python_programs.Limits(seconds=0.5))
    for body in ("return 1234", "return 1234", "return sum(iter(int, 1))", "return sum(iter(int, 1))"):
        assert grade_response(DOUBLE, f"answer: def f(xs): {body}") == 0.0
    assert len(runs) == 3


def test_the_level_is_never_lowered_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a score from a program that nothing held."""
    run = python_programs.run_program
    monkeypatch.setattr(python_programs, "run_program", lambda *a, **o: run(*a, **o, leave_out=("seccomp",)))
    with pytest.raises(SandboxError, match="FILTERED was asked for"):
        grade_response(DOUBLE, "answer: def f(xs): return 99")
    monkeypatch.setenv(LEVEL_VARIABLE, "limited")
    assert grade_response(DOUBLE, f"answer: def f(xs): return 0 + {RIGHT}") == 1.0
    monkeypatch.setenv(LEVEL_VARIABLE, "filterd")
    with pytest.raises(SandboxError, match="did you mean 'filtered'"):
        grade_response(DOUBLE, "answer: def f(xs): return 98")


def test_texts_without_a_function_are_not_run() -> None:
    """Catches a process started for every word that a model says."""
    for text in ("", "answer: 5", "answer: [1,2]", "answer: None", "answer: of f", "answer: def g(xs): pass"):
        assert program_text(text) is None
