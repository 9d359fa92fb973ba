"""What a task is: a problem with its worked answer, and the rules shared by all graders and splits."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, TypeVar

from openmimo.errors import TaskError

ANSWER_MARK = "answer:"
TEST_SHARE = 10

NAMES = (
    "Ann", "Bob", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kim", "Leo",
    "Max", "Ned", "Ola", "Pam", "Ray", "Sam", "Tom", "Una", "Vic", "Wes", "Yan", "Zoe",
)  # fmt: skip

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its worked answer.

    `solution` ends with the line `answer: <answer>`. `key` is equal for trivially equivalent problems, such as a sum
    with its operands swapped; it alone decides between train and test.
    """

    prompt: str
    solution: str
    answer: str
    domain: str
    task: str
    level: int
    key: str


class Task(ABC):
    """A generator of problems of one kind and the judge of their answers."""

    name: ClassVar[str]
    domain: ClassVar[str]
    levels: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5)

    @abstractmethod
    def generate(self, rng: Random, level: int) -> Problem:
        """A problem drawn with `rng` alone. `level` must be one of `levels`."""

    def grade(self, problem: Problem, response: str) -> float:
        """1.0 when the last `answer:` line of `response` gives the answer, else 0.0."""
        given = extract_answer(response)
        return float(given is not None and given == tidy(problem.answer))

    def guesses(self, problem: Problem) -> Sequence[str]:
        """Answers of fixed strategies that solve nothing, such as "the names in the order of the prompt".

        Entry i is always the same strategy; the baselines report the best one.
        """
        return ()

    def problem(self, prompt: str, work: Sequence[str], answer: str, *, level: int, key: str) -> Problem:
        """Joins the lines of the worked answer and marks the key with the task's name."""
        solution = "\n".join([*work, f"{ANSWER_MARK} {answer}"])
        return Problem(prompt, solution, answer, self.domain, self.name, level, f"{self.name} {key}")

    def check_level(self, level: int) -> None:
        """Raises: TaskError when the task has no such level."""
        if level not in self.levels:
            raise TaskError(
                f"task {self.name!r} has no level {level}; its levels are {self.levels[0]}-{self.levels[-1]}"
            )


def in_test(key: str) -> bool:
    """Whether problems with this key belong to the test split: one key in ten, by SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % TEST_SHARE == 0


def extract_answer(response: str) -> str | None:
    """The text of the last line that starts with `answer:`, tidied, or None."""
    for line in reversed(response.split("\n")):
        text = line.lstrip()
        if text.startswith(ANSWER_MARK):
            return tidy(text.removeprefix(ANSWER_MARK))
    return None


def tidy(text: str) -> str:
    """One space between words, none beside commas and brackets: the only freedom an answer has."""
    words = " ".join(text.split())
    for mark in ",[]|>;":
        if mark in words:
            words = mark.join(part.strip(" ") for part in words.split(mark))
    return words


def below(rng: Random, bound: int) -> int:
    """A whole number in 0..bound-1. Faster than `randrange`, and the same in all Python versions."""
    return int(rng.random() * bound)


def between(rng: Random, low: int, high: int) -> int:
    """A whole number in low..high, both included."""
    return low + int(rng.random() * (high - low + 1))


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """One of the items."""
    return items[int(rng.random() * len(items))]


def draw(rng: Random, items: Sequence[Item], count: int) -> list[Item]:
    """`count` different items in random order."""
    pool = list(items)
    last = len(pool) - 1
    for position in range(count):
        other = position + int(rng.random() * (last - position + 1))
        pool[position], pool[other] = pool[other], pool[position]
    return pool[:count]


def number_from(text: str) -> int:
    """A seed that depends on nothing but the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
