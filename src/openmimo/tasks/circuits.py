"""Boolean circuits: gates evaluated one by one, with the value written right after each name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import ClassVar

from openmimo.tasks.problem import Problem, Task, below, draw, pick

GATES: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "nand": lambda a, b: 1 - (a & b),
    "nor": lambda a, b: 1 - (a | b),
    "xnor": lambda a, b: 1 - (a ^ b),
}
Gate = tuple[str, str, str, str]
"""Its name, its kind and its two operands."""
WIRES = "abcdefghijklmnopqrstuvwxyz"


class Circuit(Task):
    """The values of all gates of a circuit.

    Level 1 has four inputs and four gates in three layers (e, f | g | h) of and, or, xor. Each level more adds an
    input, two gates and, while there are some, another kind of gate. The last gate is always the deepest.
    """

    name: ClassVar[str] = "circuit"
    domain: ClassVar[str] = "logic"

    def generate(self, rng: Random, level: int) -> Problem:
        num_inputs, num_gates = level + 3, 2 * level + 2
        kinds = tuple(GATES)[: level + 2]
        value = {wire: below(rng, 2) for wire in WIRES[:num_inputs]}
        inputs = " ".join(f"{wire}{bit}" for wire, bit in value.items())
        bits = dict(value)
        gates, work, wiring = [inputs], list[str](), list[Gate]()
        for index in range(num_gates):
            name = WIRES[num_inputs + index]
            kind = pick(rng, kinds)
            left, right = self._operands(rng, index, num_inputs)
            value[name] = GATES[kind](value[left], value[right])
            gates.append(f"{name} = {left} {kind} {right}")
            work.append(f"{name} = {left}{value[left]} {kind} {right}{value[right]}: {name}{value[name]}")
            wiring.append((name, kind, left, right))
        outputs = WIRES[num_inputs : num_inputs + num_gates]
        answer = " ".join(f"{name}{value[name]}" for name in outputs)
        key = self.shape(bits, wiring)
        return self.problem(f"circuit: {'; '.join(gates)}", [f"so {'; '.join(work)}"], answer, level=level, key=key)

    @staticmethod
    def shape(bits: Mapping[str, int], gates: Sequence[Gate]) -> str:
        """The circuit without names: inputs count in the order of their use, and operands may be swapped."""
        label: dict[str, str] = {}
        parts: list[str] = []
        for name, kind, left, right in gates:
            new = [wire for wire in (left, right) if wire not in label]
            for wire in sorted(new, key=lambda wire: (bits[wire], wire)):
                label[wire] = f"{len(label)}={bits[wire]}"
            first, second = sorted((label[left], label[right]))
            parts.append(f"{kind} {first} {second}")
            label[name] = str(len(label))
        return ";".join(parts)

    @staticmethod
    def _operands(rng: Random, index: int, num_inputs: int) -> tuple[str, str]:
        """Two inputs for the first two gates, one of these gates for the third, the newest for all others."""
        if index < 2:
            left, right = draw(rng, WIRES[:num_inputs], 2)
            return left, right
        newest = num_inputs + index - 1
        deep = newest - below(rng, 2) if index == 2 else newest
        other = below(rng, newest)
        if other >= deep:
            other += 1
        pair = (WIRES[deep], WIRES[other])
        return pair if rng.random() < 0.5 else (pair[1], pair[0])

    def guesses(self, problem: Problem) -> Sequence[str]:
        names = [word[0] for word in problem.answer.split()]
        return [" ".join(name + bit for name in names) for bit in "01"]
