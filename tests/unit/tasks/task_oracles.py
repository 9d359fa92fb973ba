"""Independent judges for the task tests: they read the text of a problem and share no code with the generators."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import permutations, product

from openmimo.tasks import Problem, sample_problem

BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LIST_OPERATIONS = {
    "add": lambda xs, k: [x + k for x in xs],
    "sub": lambda xs, k: [x - k for x in xs],
    "take": lambda xs, k: [x for i, x in enumerate(xs) if i < k],
    "drop": lambda xs, k: [x for i, x in enumerate(xs) if i >= k],
    "push": lambda xs, k: [*xs, k],
    "reverse": lambda xs, _: list(reversed(xs)),
    "rotate": lambda xs, _: [*xs[1:], xs[0]] if xs else [],
    "evens": lambda xs, _: [x for x in xs if not x & 1],
    "odds": lambda xs, _: [x for x in xs if x & 1],
    "double": lambda xs, _: [x + x for x in xs],
    "sort": lambda xs, _: sorted(xs),
    "max": lambda xs, _: sorted(xs)[-1:],
    "min": lambda xs, _: sorted(xs)[:1],
}


def problems(domain: str, task: str, level: int, count: int, split: str = "train") -> Iterator[Problem]:
    return (sample_problem(domain, split=split, level=level, seed=11, index=i, task=task) for i in range(count))


def value(expression: str, x: Fraction = Fraction(0)) -> Fraction:
    """The value of an expression in digits, + - * /, brackets, x and its powers."""
    expression = re.sub(r"x\^(\d)", lambda match: "*".join("x" * int(match[1])), expression)
    text = re.sub(r"(?<!\d)0+(?=\d)", "", expression.strip())
    text = re.sub(r"(?<=\d)(?=[x(])", "*", text)
    return _value(ast.parse(text, mode="eval").body, x)


def _value(node: ast.expr, x: Fraction) -> Fraction:
    if isinstance(node, ast.BinOp):
        return BINARY[type(node.op)](_value(node.left, x), _value(node.right, x))
    if isinstance(node, ast.UnaryOp):
        sign = {ast.USub: -1, ast.UAdd: 1}[type(node.op)]
        return sign * _value(node.operand, x)
    if isinstance(node, ast.Name):
        return x
    assert isinstance(node, ast.Constant)
    return Fraction(node.value)


def facts(text: str) -> list[tuple[str, str]]:
    """All `left=right` of a worked answer."""
    sign = r"[-0-9x+*/^]+"
    return re.findall(rf"({sign})=({sign})", text)


def numbers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"-?\d+", text)]


def run_list_program(program: str, values: list[int]) -> list[list[int]]:
    """The list after each operation."""
    seen: list[list[int]] = []
    for step in program.split("|"):
        name, *argument = step.split()
        values = LIST_OPERATIONS[name](values, int(argument[0]) if argument else 0)
        seen.append(values)
    return seen


def circuit_values(prompt: str) -> dict[str, int]:
    inputs, *gates = prompt.removeprefix("circuit:").split(";")
    wires = {word[0]: int(word[1]) for word in inputs.split()}
    for gate in gates:
        name, left, kind, right = re.fullmatch(r" (\w) = (\w) (\w+) (\w)", gate).groups()  # type: ignore[union-attr]
        wires[name] = gate_value(kind, wires[left], wires[right])
    return wires


def gate_value(kind: str, a: int, b: int) -> int:
    table = {"and": "0001", "or": "0111", "xor": "0110", "nand": "1110", "nor": "1000", "xnor": "1001"}
    return int(table[kind][2 * a + b])


def orders(prompt: str) -> list[tuple[str, ...]]:
    """All orders, largest first, that agree with the pairs."""
    pairs = []
    for pair in prompt.removeprefix("order:").split(";"):
        left, sign, right = pair.split()
        pairs.append((left, right) if sign == ">" else (right, left))
    names = sorted({name for pair in pairs for name in pair})
    return [order for order in permutations(names) if all(order.index(a) < order.index(b) for a, b in pairs)]


def said(speaker: str, claim: str, world: dict[str, bool]) -> bool:
    """Whether the claim is true in the world (True means knight)."""
    words = claim.split()
    if len(words) == 1:
        words = [next(name for name in world if name != speaker), *words]
    about, kind = words
    if kind in ("knight", "knave"):
        return world[about] == (kind == "knight")
    return (world[about] == world[speaker]) == (kind == "same")


def worlds(prompt: str) -> list[dict[str, bool]]:
    """All assignments of roles that agree with what was said."""
    claims = [part.strip().split(" says ") for part in prompt.removeprefix("roles:").split(";")]
    people = list(dict.fromkeys(speaker for speaker, _ in claims))
    found = []
    for roles in product((False, True), repeat=len(people)):
        world = dict(zip(people, roles, strict=True))
        if all(said(speaker, claim, world) == world[speaker] for speaker, claim in claims):
            found.append(world)
    return found
