"""Polynomials: worked steps against evaluation at many points, and answers in all the ways they may be written."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from task_oracles import problems, value

from openmimo.tasks import Problem, grade_response
from openmimo.tasks.expressions import read_polynomial

LEVELS = (2, 3, 4, 5)


def at(expression: str, x: int) -> Fraction:
    """The value, with `)(` multiplied."""
    return value(expression.replace(")(", ")*("), Fraction(x))


@pytest.mark.parametrize("level", LEVELS)
def test_every_step_holds_at_every_point(level: int) -> None:
    """Catches signs, powers and terms lost on the way: degree 3 is settled by four points."""
    for problem in problems("math", "expand", level, 60):
        product = problem.prompt.removeprefix("expand ")
        assert all(at(product, x) == at(problem.answer, x) for x in range(-3, 4))
        steps = problem.solution.split("\n")[:-1]
        for left, right in re.findall(r"(-?[\dx^]+\*-?[\dx^]+)=(-?[\dx^]+)", "; ".join(steps)):
            first, second = left.split("*")
            assert all(at(first, x) * at(second, x) == at(right, x) for x in range(-3, 4))
        for left, right in re.findall(r": ([-+\d]+)=(-?\d+)", "; ".join(steps)):
            assert value(left) == int(right)
        for step in steps:
            if step.startswith("so "):
                assert all(at(step.removeprefix("so "), x) == at(product, x) for x in range(-3, 4))


def test_swapped_factors_have_one_key() -> None:
    """Catches test problems that training has seen the other way round."""
    for problem in problems("math", "expand", 3, 50):
        factors = re.findall(r"\(.*?\)", problem.key)
        assert factors == sorted(factors)
    assert len({problem.key for problem in problems("math", "expand", 5, 500)}) > 470


QUADRATIC = Problem("", "", "2x^2-x+5", "math", "expand", 4, "k")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("2x^2-x+5", 1.0),
        ("2x^2 - x + 5", 1.0),
        ("5 - x + 2x^2", 1.0),
        ("+2*x**2-1x+5", 1.0),
        ("2x^2-x^1+5x^0", 1.0),
        ("2x^2-x+4", 0.0),
        ("x^2+x^2-x+5", 0.0),
        ("2x^2-x+5+0", 0.0),
        ("2x^2-x+5+", 0.0),
        ("2x^2--x+5", 0.0),
        ("2x^2-*x+5", 0.0),
        ("2*x^2-x+5*", 0.0),
        ("(2x-1)x+5", 0.0),
        ("2xx-x+5", 0.0),
        ("2y^2-y+5", 0.0),
        ("2x²-x+5", 0.0),
        ("x", 0.0),
        ("", 0.0),
        ("0", 0.0),
        ("__import__('os').system('true')", 0.0),
        ("9" * 10_000, 0.0),
        ("x^" + "9" * 50, 0.0),
        ("x^9" * 10**6, 0.0),
    ],
)
def test_answers_are_read_exactly(answer: str, score: float) -> None:
    """Catches a reader that lets through what is not collected, and text that is evaluated."""
    assert grade_response(QUADRATIC, f"answer: {answer}") == score


def test_zero_is_a_polynomial() -> None:
    """Catches a sum that cancels and has no answer."""
    assert read_polynomial("0") == {}
    assert read_polynomial("00") is None
    assert read_polynomial("-0") is None


@pytest.mark.parametrize("level", LEVELS)
def test_computer_algebra_agrees(level: int) -> None:
    """Catches a reader of our own that means another polynomial than everyone else."""
    math_verify = pytest.importorskip("math_verify")
    for problem in problems("math", "expand", level, 10):
        product, answer = (f"${text}$" for text in (problem.prompt.removeprefix("expand "), problem.answer))
        assert math_verify.verify(math_verify.parse(product), math_verify.parse(answer))
        wrong = f"${problem.answer}+1$"
        assert not math_verify.verify(math_verify.parse(product), math_verify.parse(wrong))
