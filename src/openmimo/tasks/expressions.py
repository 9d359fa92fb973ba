"""Products of polynomials in x, multiplied out and collected.

An answer is read by a grammar of a few lines and compared exactly: no computer algebra, which can be made to evaluate
text or to compute for hours, sees what a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from random import Random
from typing import ClassVar

from openmimo.tasks.problem import Problem, Task, between, draw, extract_answer

MAX_CHARACTERS = 200
TERM = re.compile(r"([+-])(\d{1,9})?\*?(x(?:(?:\^|\*\*)(\d))?)?")

# A polynomial: coefficients by power, none of them 0.
Polynomial = dict[int, int]


class Expand(Task):
    """A polynomial without brackets, with one term per power.

    Level 2 adds two multiples of x+b, level 3 multiplies two such sums, level 4 has factors before x and a sum after
    the product, level 5 multiplies three sums. Any order of terms counts, and `*` and `**` where others leave them out.
    """

    name: ClassVar[str] = "expand"
    domain: ClassVar[str] = "math"
    levels: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    def generate(self, rng: Random, level: int) -> Problem:
        products = _draw(rng, level)
        prompt = "expand " + _join(_product_text(factors) for factors in products)
        work: list[str] = []
        parts = [_multiply_out(factors, work) for factors in products]
        result = _collect([term for part in parts for term in _terms(part)], work if len(parts) > 1 else None)
        # Products of the same sums are one problem, in whatever order they are written.
        ordered = sorted(_product_text(sorted(factors, key=_text)) for factors in products)
        return self.problem(prompt, work, _text(result), level=level, key=_join(ordered))

    def grade(self, problem: Problem, response: str) -> float:
        """1.0 when the answer has exactly the terms of the right one."""
        given = extract_answer(response)
        return float(given is not None and read_polynomial(given) == read_polynomial(problem.answer))

    def guesses(self, problem: Problem) -> Sequence[str]:
        """Nothing, and the highest power alone."""
        return ["0", "x", "x^2", "x^3"]


def read_polynomial(text: str) -> Polynomial | None:
    """The coefficients by power of a sum such as `x^2-3x+5`; None for all else, two terms of one power included."""
    text = text.replace(" ", "")
    if not text or len(text) > MAX_CHARACTERS or not text.isascii():
        return None
    if text == "0":
        return {}
    rest, found = text if text[0] in "+-" else f"+{text}", Polynomial()
    while rest:
        match = TERM.match(rest)
        if match is None or not (match[2] or match[3]) or match[0].endswith("*"):
            return None
        sign, number, variable, power = match.groups()
        exponent = int(power or 1) if variable else 0
        coefficient = int(f"{sign}{number or 1}")
        starred = "*" in match[0].removesuffix(variable or "")
        if exponent in found or not coefficient or (starred and not (number and variable)):
            return None
        found[exponent] = coefficient
        rest = rest[match.end() :]
    return found


def _draw(rng: Random, level: int) -> list[list[Polynomial]]:
    """Products to be added; each is a list of factors."""
    if level == 2:
        a, b = (between(rng, 2, 9) * (1 if rng.random() < 0.5 else -1) for _ in range(2))
        return [[{0: a}, _binomial(rng, 1, 9)], [{0: b}, _binomial(rng, 1, 9)]]
    if level == 3:
        return [[_binomial(rng, 1, 30), _binomial(rng, 1, 30)]]
    if level == 4:
        a, b = draw(rng, range(2, 8), 2)
        return [[_binomial(rng, a, 9), _binomial(rng, b, 9)], [_binomial(rng, between(rng, 2, 20), 20)]]
    return [[_binomial(rng, 1, 9), _binomial(rng, 1, 9), _binomial(rng, between(rng, 2, 5), 9)]]


def _binomial(rng: Random, leading: int, highest: int) -> Polynomial:
    return {1: leading, 0: between(rng, 1, highest) * (1 if rng.random() < 0.5 else -1)}


def _multiply_out(factors: Sequence[Polynomial], work: list[str]) -> Polynomial:
    """The product; for every factor but the first, a line of products of terms and one of collected powers."""
    result = factors[0]
    for place, factor in enumerate(factors[1:], 1):
        products = [(a, b, (a[0] * b[0], a[1] + b[1])) for a in _terms(result) for b in _terms(factor)]
        work.append("; ".join(f"{_term(a)}*{_term(b)}={_term(c)}" for a, b, c in products))
        result = _collect([c for _, _, c in products], work if len(result) > 1 else None)
        rest = "".join(f"({_text(other)})" for other in factors[place + 1 :])
        if rest:
            work.append(f"so ({_text(result)}){rest}")
    return result


def _collect(terms: Sequence[tuple[int, int]], work: list[str] | None) -> Polynomial:
    """The sum of terms; `x: 3-2=1` for every power in `work`."""
    powers = sorted({power for _, power in terms}, reverse=True)
    sums = {power: sum(c for c, p in terms if p == power) for power in powers}
    if work is not None:
        lines: list[str] = []
        for power in powers:
            added = [c for c, p in terms if p == power]
            shown = str(added[0]) + "".join(f"{c:+d}" for c in added[1:])
            lines.append(f"{_term((1, power))}: {shown}" + (f"={sums[power]}" if len(added) > 1 else ""))
        work.append("; ".join(lines))
    return {power: value for power, value in sums.items() if value}


def _terms(polynomial: Polynomial) -> list[tuple[int, int]]:
    """(coefficient, power), highest power first."""
    return [(polynomial[power], power) for power in sorted(polynomial, reverse=True)]


def _term(term: tuple[int, int]) -> str:
    coefficient, power = term
    variable = "" if power == 0 else "x" if power == 1 else f"x^{power}"
    if not variable or abs(coefficient) != 1:
        return f"{coefficient}{variable}"
    return f"-{variable}" if coefficient < 0 else variable


def _text(polynomial: Polynomial) -> str:
    return _join(map(_term, _terms(polynomial))) or "0"


def _join(parts: Iterable[str]) -> str:
    """A sum: the sign of a part is the sign between."""
    text = ""
    for part in parts:
        text += part if not text or part.startswith("-") else f"+{part}"
    return text


def _product_text(factors: Sequence[Polynomial]) -> str:
    if len(factors) == 1:
        return _text(factors[0])
    return "".join(_text(factor) if set(factor) == {0} else f"({_text(factor)})" for factor in factors)
