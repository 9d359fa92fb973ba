"""Linear equations and greatest common divisors."""

from __future__ import annotations

import math
from random import Random
from typing import ClassVar

from openmimo.tasks.arithmetic import difference_columns
from openmimo.tasks.problem import Problem, Task, between, pick


class Linear(Task):
    """Equations in x with one whole solution.

    Level 1 is `ax+b=c` with a and x in 2..9 and two-digit b and c: one difference in columns, one division inside the
    multiplication table. Level 2 has negative numbers, level 3 x on both sides, levels 4 and 5 brackets.
    """

    name: ClassVar[str] = "linear"
    domain: ClassVar[str] = "math"

    def generate(self, rng: Random, level: int) -> Problem:
        if level == 1:
            a, x = between(rng, 2, 9), between(rng, 2, 9)
            b = between(rng, 10, 99 - a * x)
            c = a * x + b
            equation = f"{a}x+{b}={c}"
            work = [*difference_columns(c, b, 2), f"{a * x:02d}/{a}={x}"]
            return self.problem(f"solve {equation}", work, str(x), level=level, key=equation)
        span = 10 * level
        a, b, x = between(rng, 2, 9), _nonzero(rng, span), between(rng, -span, span)
        if level == 2:
            equation, work = f"{a}x{b:+d}={a * x + b}", [*_isolate(a, b, a * x + b)]
        elif level == 3:
            equation, work = _both_sides(a, b, x, pick(rng, [n for n in range(2, 10) if n != a]))
        else:
            equation, work = _brackets(a, b, x, _nonzero(rng, span), between(rng, 2, 9) if level == 5 else 0)
        return self.problem(f"solve {equation}", work, str(x), level=level, key=equation)


def _nonzero(rng: Random, span: int) -> int:
    return between(rng, 1, span) * (1 if rng.random() < 0.5 else -1)


def _isolate(a: int, b: int, c: int) -> list[str]:
    """Solves a*x+b=c."""
    return [f"{c}{-b:+d}={c - b}", f"{c - b}/{a}={(c - b) // a}"]


def _both_sides(a: int, b: int, x: int, other: int) -> tuple[str, list[str]]:
    d = a * x + b - other * x
    equation = f"{a}x{b:+d}={other}x{d:+d}"
    return equation, [f"{a}x-{other}x={a - other}x", f"{d}{-b:+d}={d - b}", f"{d - b}/{a - other}={x}"]


def _brackets(a: int, b: int, x: int, c: int, other: int) -> tuple[str, list[str]]:
    """a(x+b)+c=d, or =other*x+d when `other` is not 0."""
    constant = a * b + c
    work = [f"{a}*{b}={a * b}", f"{a * b}{c:+d}={constant}"]
    if other in (0, a):
        total = a * x + constant
        return f"{a}(x{b:+d}){c:+d}={total}", work + _isolate(a, constant, total)
    equation, rest = _both_sides(a, constant, x, other)
    return f"{a}(x{b:+d}){c:+d}={equation.split('=')[1]}", work + rest


class GreatestDivisor(Task):
    """Greatest common divisors by Euclid's steps, of numbers below 100 (level 2) to 100,000."""

    name: ClassVar[str] = "gcd"
    domain: ClassVar[str] = "math"
    levels: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    def generate(self, rng: Random, level: int) -> Problem:
        divisor = between(rng, 2, 4 * level)
        bound = 10**level // divisor
        left, right = between(rng, 2, bound), between(rng, 2, bound)
        while math.gcd(left, right) > 1 or left == right:
            left, right = between(rng, 2, bound), between(rng, 2, bound)
        left, right = left * divisor, right * divisor
        work: list[str] = []
        large, small = max(left, right), min(left, right)
        while small:
            quotient, rest = divmod(large, small)
            work.append(f"{large}={quotient}*{small}+{rest}")
            large, small = small, rest
        key = f"{min(left, right)},{max(left, right)}"
        return self.problem(f"gcd {left} {right}", work, str(large), level=level, key=key)
