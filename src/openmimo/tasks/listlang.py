"""A small language of programs over lists of whole numbers: `drop 1 | add 2 | reverse`.

A program is one to `MAX_OPERATIONS` operations joined by `|`, each a name and, for some, one number. Running one
is bounded in time and memory by the limits below; nothing is ever evaluated by Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from openmimo.errors import TaskError, nearest

MAX_OPERATIONS = 12
MAX_PROGRAM_CHARACTERS = 200
MAX_LIST_LENGTH = 64
MAX_ARGUMENT = 99
MAX_VALUE = 1_000_000

Values = tuple[int, ...]


class ProgramError(TaskError):
    """A program or list that cannot be read, or that breaks a limit when it runs."""


def _rotate(values: Values, _: int) -> Values:
    return values[1:] + values[:1]


WITH_ARGUMENT: dict[str, Callable[[Values, int], Values]] = {
    "add": lambda values, k: tuple(v + k for v in values),
    "sub": lambda values, k: tuple(v - k for v in values),
    "take": lambda values, k: values[:k],
    "drop": lambda values, k: values[k:],
    "push": lambda values, k: (*values, k),
}
WITHOUT_ARGUMENT: dict[str, Callable[[Values, int], Values]] = {
    "reverse": lambda values, _: values[::-1],
    "rotate": _rotate,
    "evens": lambda values, _: tuple(v for v in values if v % 2 == 0),
    "odds": lambda values, _: tuple(v for v in values if v % 2),
    "double": lambda values, _: tuple(2 * v for v in values),
    "sort": lambda values, _: tuple(sorted(values)),
    "max": lambda values, _: (max(values),) if values else (),
    "min": lambda values, _: (min(values),) if values else (),
}
OPERATIONS = {**WITH_ARGUMENT, **WITHOUT_ARGUMENT}


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a program; `argument` is 0 and unused where the operation takes none."""

    name: str
    argument: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.argument}" if self.name in WITH_ARGUMENT else self.name


Program = tuple[Operation, ...]


def parse_program(text: str) -> Program:
    """Reads `add 2 | reverse`.

    Raises: ProgramError for unknown names, missing or extra numbers, and programs beyond the limits.
    """
    if len(text) > MAX_PROGRAM_CHARACTERS:
        raise ProgramError(f"the program has {len(text)} characters; at most {MAX_PROGRAM_CHARACTERS} are allowed")
    parts = text.split("|")
    if len(parts) > MAX_OPERATIONS:
        raise ProgramError(f"the program has {len(parts)} operations; at most {MAX_OPERATIONS} are allowed")
    return tuple(_parse_operation(part.split()) for part in parts)


def _parse_operation(words: Sequence[str]) -> Operation:
    if not words:
        raise ProgramError("an operation is missing; write them as in `drop 1 | reverse`")
    name = words[0]
    if name not in OPERATIONS:
        raise ProgramError(f"unknown operation {name!r}; {nearest(name, OPERATIONS)}")
    expected = 2 if name in WITH_ARGUMENT else 1
    if len(words) != expected:
        raise ProgramError(f"{' '.join(words)!r}: {name} takes {expected - 1} numbers, got {len(words) - 1}")
    return Operation(name, _parse_number(words[1]) if expected == 2 else 0)


def _parse_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 2):
        raise ProgramError(f"{text!r} is not a whole number from 0 to {MAX_ARGUMENT}")
    return int(text)


def run_program(program: Program, values: Sequence[int]) -> Values:
    """The list that the program makes of `values`.

    Raises: ProgramError when a list grows beyond `MAX_LIST_LENGTH` or a number beyond `MAX_VALUE`.
    """
    current = tuple(values)
    _check_list(current)
    for operation in program:
        current = OPERATIONS[operation.name](current, operation.argument)
        _check_list(current)
    return current


def _check_list(values: Values) -> None:
    if len(values) > MAX_LIST_LENGTH:
        raise ProgramError(f"a list has {len(values)} numbers; at most {MAX_LIST_LENGTH} are allowed")
    if values and (max(values) > MAX_VALUE or min(values) < -MAX_VALUE):
        raise ProgramError(f"a number lies beyond {MAX_VALUE}; use smaller numbers")


def format_program(program: Program) -> str:
    """The text that `parse_program` reads back."""
    return " | ".join(map(str, program))


def format_list(values: Sequence[int]) -> str:
    """`[5,2,7]`."""
    return f"[{','.join(map(str, values))}]"


def parse_list(text: str) -> Values:
    """Reads `[5,2,7]`.

    Raises: ProgramError for anything else.
    """
    body = text.strip()
    if not (body.startswith("[") and body.endswith("]")) or len(body) > 12 * MAX_LIST_LENGTH:
        raise ProgramError(f"{body[:40]!r} is not a list; write it as [5,2,7]")
    inner = body[1:-1].strip()
    return tuple(_parse_element(part.strip()) for part in inner.split(",")) if inner else ()


def _parse_element(text: str) -> int:
    magnitude = text.removeprefix("-")
    if not (magnitude.isascii() and magnitude.isdigit() and len(magnitude) <= 7):
        raise ProgramError(f"{text[:20]!r} is not a whole number of a list")
    return int(text)
