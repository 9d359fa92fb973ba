"""Column arithmetic: every line of the worked answer is one fact about single digits.

A column reads `7+5+0=12>2`: the two digits, the carry, their sum in two digits, and after `>` the result so far.
A column of a difference reads `3-7-0=6-10>6`: the ten that was borrowed stands behind the digit, and its 1 or 0 is
the borrow of the next column. A step of a product reads `7*6=42;2+3=05;4+0=4>5`: the product, its units with the
carry, its tens with what that sum carried (the next carry), the result so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import ClassVar

from openmimo.tasks.problem import Problem, Task, below, between


def digit(number: int, place: int) -> int:
    """The digit of `number` at `place`, units first."""
    return number // 10**place % 10


def sum_columns(left: int, right: int, num_digits: int) -> list[str]:
    """The columns of `left + right`; the last one keeps its carry."""
    lines: list[str] = []
    carry, done = 0, ""
    for place in range(num_digits):
        a, b = digit(left, place), digit(right, place)
        total = a + b + carry
        done = f"{total if place == num_digits - 1 else total % 10}{done}"
        lines.append(f"{a}+{b}+{carry}={total:02d}>{done}")
        carry = total // 10
    return lines


def difference_columns(left: int, right: int, num_digits: int) -> list[str]:
    """The columns of `left - right` for left >= right; the result keeps leading zeros."""
    lines: list[str] = []
    borrow, done = 0, ""
    for place in range(num_digits):
        a, b = digit(left, place), digit(right, place)
        rest = a - b - borrow
        done = f"{rest % 10}{done}"
        lines.append(f"{a}-{b}-{borrow}={rest % 10}-{10 if rest < 0 else 0:02d}>{done}")
        borrow = int(rest < 0)
    return lines


def product_steps(number: int, factor: int, num_digits: int, *, addend: int = 0) -> list[str]:
    """The steps of `number * factor + addend` for a one-digit factor and addend."""
    lines: list[str] = []
    carry, done = addend, ""
    for place in range(num_digits):
        a = digit(number, place)
        product = a * factor
        units = product % 10 + carry
        next_carry = product // 10 + units // 10
        done = f"{units % 10}{done}"
        if place == num_digits - 1 and next_carry:
            done = f"{next_carry}{done}"
        lines.append(
            f"{a}*{factor}={product:02d};{product % 10}+{carry}={units:02d};"
            f"{product // 10}+{units // 10}={next_carry}>{done}"
        )
        carry = next_carry
    return lines


class Addition(Task):
    """Sums of two numbers of 3 digits (level 1) to 7; at level 1 the sum has 3 digits too."""

    name: ClassVar[str] = "add"
    domain: ClassVar[str] = "math"

    def generate(self, rng: Random, level: int) -> Problem:
        num_digits = level + 2
        low, high = 10 ** (num_digits - 1), 10**num_digits - 1
        if level == 1:
            total = between(rng, 2 * low, high)
            left = between(rng, low, total - low)
            right = total - left
        else:
            left, right = between(rng, low, high), between(rng, low, high)
        key = f"{min(left, right)}+{max(left, right)}"
        return self.problem(
            f"{left}+{right}=?", sum_columns(left, right, num_digits), str(left + right), level=level, key=key
        )


class Subtraction(Task):
    """Differences of two numbers of 3 digits (level 1) to 7, never negative; at level 1 the result has 3 digits."""

    name: ClassVar[str] = "subtract"
    domain: ClassVar[str] = "math"

    def generate(self, rng: Random, level: int) -> Problem:
        num_digits = level + 2
        low, high = 10 ** (num_digits - 1), 10**num_digits - 1
        if level == 1:
            left = between(rng, 2 * low, high)
            right = between(rng, low, left - low)
        else:
            right, left = sorted((between(rng, low, high), between(rng, low, high)))
        return self.problem(
            f"{left}-{right}=?",
            difference_columns(left, right, num_digits),
            str(left - right),
            level=level,
            key=f"{left}-{right}",
        )


class Product(Task):
    """Level 1: two digits times one digit plus one digit, with a result of 3 digits. Higher: 2x2 to 4x3 digits."""

    name: ClassVar[str] = "multiply"
    domain: ClassVar[str] = "math"

    _sizes: ClassVar[tuple[tuple[int, int], ...]] = ((2, 1), (2, 2), (3, 2), (3, 3), (4, 3))

    def generate(self, rng: Random, level: int) -> Problem:
        if level == 1:
            factor = between(rng, 2, 9)
            left = between(rng, -(-100 // factor), 99)
            addend = below(rng, 10)
            work = product_steps(left, factor, 2, addend=addend)
            prompt = f"{left}*{factor}+{addend}=?"
            return self.problem(prompt, work, str(left * factor + addend), level=level, key=prompt)
        num_left, num_right = self._sizes[level - 1]
        left = between(rng, 10 ** (num_left - 1), 10**num_left - 1)
        right = between(rng, 10 ** (num_right - 1), 10**num_right - 1)
        key = f"{min(left, right)}*{max(left, right)}"
        return self.problem(f"{left}*{right}=?", long_product(left, right), str(left * right), level=level, key=key)


def long_product(left: int, right: int) -> list[str]:
    """One partial product per digit of `right`, each added to the total so far."""
    lines: list[str] = []
    num_left = len(str(left))
    total = 0
    for place in range(len(str(right))):
        factor = digit(right, place)
        part = left * factor
        shifted = part * 10**place
        lines.append(f"{left}*{factor}:")
        lines += product_steps(left, factor, num_left)
        if place:
            lines.append(f"{total}+{shifted}:")
            lines += sum_columns(total, shifted, max(len(str(total)), len(str(shifted))))
        total += shifted
    return lines


class Chain(Task):
    """Sums and differences of 3 (level 2) to 6 numbers, from left to right; no total on the way is negative."""

    name: ClassVar[str] = "chain"
    domain: ClassVar[str] = "math"
    levels: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    def generate(self, rng: Random, level: int) -> Problem:
        total = between(rng, 100, 999)
        prompt = str(total)
        work: list[str] = []
        for _ in range(level):
            number = between(rng, 10, 999)
            minus = number <= total and rng.random() < 0.5
            prompt += f"{'-' if minus else '+'}{number}"
            work += self._step(total, number, minus)
            total += -number if minus else number
        return self.problem(f"{prompt}=?", work, str(total), level=level, key=prompt)

    @staticmethod
    def _step(total: int, number: int, minus: bool) -> Sequence[str]:
        num_digits = max(len(str(total)), len(str(number)))
        if minus:
            return [f"{total}-{number}:", *difference_columns(total, number, num_digits)]
        return [f"{total}+{number}:", *sum_columns(total, number, num_digits)]
