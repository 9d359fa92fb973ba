"""Code tasks over the list language: predict what a program gives, and write a program from examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import ClassVar

from openmimo.tasks.listlang import (
    WITH_ARGUMENT,
    WITHOUT_ARGUMENT,
    Operation,
    Program,
    ProgramError,
    Values,
    format_list,
    format_program,
    parse_list,
    parse_program,
    run_program,
)
from openmimo.tasks.problem import Problem, Task, between, draw, extract_answer, number_from, pick

FIRST_OPERATIONS = ("add", "sub", "take", "drop", "push", "reverse")
LATER_OPERATIONS = (*FIRST_OPERATIONS, "rotate", "evens", "odds", "double", "sort", "max", "min")
ELEMENTWISE = {"add": "+", "sub": "-", "double": "*"}
NUM_HIDDEN_EXAMPLES = 8


def apply(operation: Operation, values: Values) -> Values:
    """One operation."""
    return run_program((operation,), values)


def explain(operation: Operation, values: Values) -> str:
    """`add 2: 5+2=7,1+2=3 [7,3]`: the operation, its facts where it has some, and the new list."""
    result = format_list(apply(operation, values))
    name = operation.name
    if name in ELEMENTWISE:
        number = 2 if name == "double" else operation.argument
        facts = (f"{v}{ELEMENTWISE[name]}{number}={w}" for v, w in zip(values, apply(operation, values), strict=True))
        return f"{operation}: {','.join(facts)} {result}"
    if name in ("evens", "odds"):
        keep = 0 if name == "evens" else 1
        facts = (f"{v} {'yes' if v % 2 == keep else 'no'}" for v in values)
        return f"{operation}: {','.join(facts)} {result}"
    if name == "sort":
        return f"{operation}: {','.join(selections(values))} {result}"
    return f"{operation} {result}"


def selections(values: Values) -> list[str]:
    """Selection sort in the open: the smallest, then the list without it."""
    rest, steps = list(values), list[str]()
    while rest:
        smallest = min(rest)
        rest.remove(smallest)
        steps.append(f"{smallest} of {format_list(rest)}")
    return steps


class Predict(Task):
    """The list after up to three (level 1) or seven operations; the worked answer shows every list between.

    Level 1 has two or three unless one of them does not fit the list. It keeps to different digits and to the simplest
    operations, with arithmetic in one of them at most.
    """

    name: ClassVar[str] = "predict"
    domain: ClassVar[str] = "code"

    def generate(self, rng: Random, level: int) -> Problem:
        values, program = _first_level(rng) if level == 1 else _later_level(rng, level)
        steps: list[str] = []
        current = values
        for operation in program:
            steps.append(explain(operation, current))
            current = apply(operation, current)
        key = f"{format_list(values)} | {format_program(program)}"
        return self.problem(f"run: {key}", [f"so {' | '.join(steps)}"], format_list(current), level=level, key=key)

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The input itself, and the input reversed."""
        values = parse_list(problem.prompt.removeprefix("run:").partition("|")[0])
        return [format_list(values), format_list(values[::-1])]


def _first_level(rng: Random) -> tuple[Values, Program]:
    low = between(rng, 0, 3)
    values = current = tuple(draw(rng, range(low, low + 7), between(rng, 3, 5)))
    program: list[Operation] = []
    open_names: list[str] = list(FIRST_OPERATIONS)
    for _ in range(between(rng, 2, 3)):
        name = pick(rng, open_names)
        operation = _digit_operation(rng, name, current)
        if operation is None:
            continue
        open_names.remove(name)
        if name in ELEMENTWISE:
            open_names = [other for other in open_names if other not in ELEMENTWISE]
        program.append(operation)
        current = apply(operation, current)
    return values, tuple(program) or (Operation("reverse"),)


def _digit_operation(rng: Random, name: str, values: Values) -> Operation | None:
    """An operation that keeps the list non-empty, its numbers different digits; None if there is none of that name."""
    if name == "reverse":
        return Operation(name) if len(values) > 1 else None
    if name == "push":
        return Operation(name, pick(rng, [v for v in range(10) if v not in values])) if len(values) < 5 else None
    highest = {"add": 9 - max(values), "sub": min(values), "take": len(values) - 1, "drop": len(values) - 1}[name]
    return Operation(name, between(rng, 1, min(highest, 4))) if highest > 0 else None


def _later_level(rng: Random, level: int) -> tuple[Values, Program]:
    top = 10 * level
    values = current = tuple(between(rng, 0, top) for _ in range(between(rng, 4, 3 + level)))
    program: list[Operation] = []
    length = between(rng, level, level + 2)
    while len(program) < length:
        name = pick(rng, LATER_OPERATIONS)
        operation = Operation(name, _argument(rng, name, len(current)))
        after = apply(operation, current)
        # An operation that empties the list, or leaves one number early, makes the rest of the program pointless.
        if len(after) < 2 and (not after or len(program) < length - 1):
            continue
        if name == "sub" and min(after) < 0:
            continue
        program.append(operation)
        current = after
    return values, tuple(program)


def _argument(rng: Random, name: str, length: int) -> int:
    if name in ("take", "drop"):
        return between(rng, 1, max(1, length - 1))
    return between(rng, 1, 9) if name in ("add", "sub", "push") else 0


Example = tuple[Values, Values]


class Synthesize(Task):
    """A program that gives the outputs of the examples shown: two, and one operation, at level 1.

    Levels 2 and 3 need two operations, 4 and 5 three, with three examples; odd levels use all operations but max and
    min. Any program is right that gives the outputs of the examples shown and of eight hidden ones, which depend on
    the problem's key only. The worked answer compares lengths, first and last numbers in the first example.
    """

    name: ClassVar[str] = "synthesize"
    domain: ClassVar[str] = "code"

    def generate(self, rng: Random, level: int) -> Problem:
        examples: list[Example] = []
        program: Program = ()
        while not examples:
            program = _draw_program(rng, level)
            examples = _draw_examples(rng, program)
        shown = "; ".join(f"{format_list(before)} to {format_list(after)}" for before, after in examples)
        answer = format_program(program)
        key = f"{answer}: {'; '.join(sorted(format_list(before) for before, _ in examples))}"
        return self.problem(f"find: {shown}", _compare(program, examples[0][0]), answer, level=level, key=key)

    def grade(self, problem: Problem, response: str) -> float:
        """1.0 when the program in the last `answer:` line gives all outputs, shown and hidden."""
        given = extract_answer(response)
        if given is None:
            return 0.0
        examples = all_examples(problem)
        try:
            program = parse_program(given)
            right = all(run_program(program, before) == after for before, after in examples)
        except ProgramError:
            return 0.0
        return float(right)

    def guesses(self, problem: Problem) -> Sequence[str]:
        """Every program of one small operation."""
        return [
            *(f"{name} {k}" for name in WITH_ARGUMENT for k in range(1, 4)),
            *WITHOUT_ARGUMENT,
        ]


@lru_cache(maxsize=1024)  # a problem is graded once per sample of a group
def all_examples(problem: Problem) -> tuple[Example, ...]:
    """The examples of the prompt, then the hidden ones."""
    examples: list[Example] = []
    for pair in problem.prompt.removeprefix("find:").split(";"):
        before, _, after = pair.partition(" to ")
        examples.append((parse_list(before), parse_list(after)))
    rng = Random(number_from(problem.key))
    program = parse_program(problem.answer)
    for _ in range(NUM_HIDDEN_EXAMPLES):
        values = tuple(between(rng, 0, 30) for _ in range(between(rng, 1, 8)))
        examples.append((values, run_program(program, values)))
    return tuple(examples)


def _draw_program(rng: Random, level: int) -> Program:
    names = FIRST_OPERATIONS if level == 1 or level % 2 == 0 else LATER_OPERATIONS[:-2]
    return tuple(Operation(name, _small_argument(rng, name)) for name in draw(rng, names, 1 + level // 2))


def _small_argument(rng: Random, name: str) -> int:
    if name in ("take", "drop"):
        return between(rng, 1, 2)
    return between(rng, 1, 5) if name in ("add", "sub") else between(rng, 0, 9) if name == "push" else 0


def _draw_examples(rng: Random, program: Program) -> list[Example]:
    """Inputs of different digits and lengths; empty when the program does not show itself on them.

    With one operation all numbers stay digits and a pushed number is new to the list. Every operation must change
    the first example's list and leave no example empty.
    """
    lowest = sum(operation.argument for operation in program if operation.name == "sub")
    highest = 9 + lowest
    if len(program) == 1:
        highest = 9 - sum(operation.argument for operation in program if operation.name == "add")
    pushed = [operation.argument for operation in program if operation.name == "push"]
    digits = [v for v in range(lowest, highest + 1) if v not in pushed]
    lengths = draw(rng, (3, 4, 5), 2) if len(program) == 1 else draw(rng, (4, 5, 6, 7), 3)
    examples: list[Example] = []
    for length in lengths:
        values = current = tuple(draw(rng, digits, length))
        for operation in program:
            after = apply(operation, current)
            if not after or (not examples and after == current):
                return []
            current = after
        examples.append((values, current))
    return examples


def _compare(program: Program, values: Values) -> list[str]:
    lines: list[str] = []
    for operation in program:
        after = apply(operation, values)
        seen = f"len {len(values)} {len(after)} first {values[0]} {after[0]} last {values[-1]} {after[-1]}"
        listed = f" {format_list(after)}" if len(program) > 1 else ""
        lines.append(f"{seen} so {_conclusion(operation, values, after)}{listed}")
        values = after
    return lines


def _conclusion(operation: Operation, before: Values, after: Values) -> str:
    name = operation.name
    if name == "add":
        return f"add {after[0]}-{before[0]}={operation.argument}"
    if name == "sub":
        return f"sub {before[0]}-{after[0]}={operation.argument}"
    if name == "drop" and len(after) == len(before) - operation.argument:
        return f"drop {len(before)}-{len(after)}={operation.argument}"
    return str(operation)
