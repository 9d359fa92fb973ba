"""Retrieval: facts about people hidden in long text, and lists of pairs to look things up in."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import ClassVar

from openmimo.errors import TaskError
from openmimo.tasks.problem import NAMES, Problem, Task, below, between, draw, pick

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Characters of the text at levels 1 to 8."""

SUBJECTS = ("fox", "owl", "cat", "dog", "hen", "ant", "bee", "cow")
ACTIONS = ("sleeps", "sings", "waits", "runs", "hides", "plays")
PLACES = ("by the pond", "in the barn", "near the road", "on the hill", "at the mill", "under the tree")


def filler_sentence(rng: Random) -> str:
    """`The fox sleeps by the pond.`"""
    return f"The {pick(rng, SUBJECTS)} {pick(rng, ACTIONS)} {pick(rng, PLACES)}."


class Needle(Task):
    """Facts `Ann has #472.` between filler sentences; the question names one person (or `num_asked`).

    `sentences` replaces the generated filler. The text is filled up to `LENGTHS[level - 1]` characters; there are three
    facts more than the level's number, up to ten.
    Raises: TaskError for sentences that are empty or could be read as facts.
    """

    name: ClassVar[str] = "needle"
    domain: ClassVar[str] = "retrieval"
    levels: ClassVar[tuple[int, ...]] = tuple(range(1, len(LENGTHS) + 1))
    num_asked: ClassVar[int] = 1

    def __init__(self, sentences: Sequence[str] = ()) -> None:
        bad = [text for text in sentences if not text.strip() or "#" in text]
        if bad:
            raise TaskError(f"filler sentence {bad[0][:40]!r} is empty or holds '#', which marks facts; leave it out")
        self._sentences = tuple(sentences)

    def generate(self, rng: Random, level: int) -> Problem:
        people = draw(rng, NAMES, min(level + 3, 10))
        facts = [f"{person} has #{between(rng, 100, 999)}" for person in people]
        text = self._haystack(rng, [f"{fact}." for fact in facts], LENGTHS[level - 1])
        asked = draw(rng, range(len(facts)), self.num_asked)
        answer = " ".join(facts[i].partition("#")[2] for i in asked)
        key = " ".join(sorted(facts[i] for i in asked))
        return self.problem(
            f"read: {text}\nask: {', '.join(people[i] for i in asked)}",
            [f"so {', '.join(facts[i] for i in asked)}"],
            answer,
            level=level,
            key=key,
        )

    def _haystack(self, rng: Random, facts: list[str], num_characters: int) -> str:
        room = num_characters - sum(len(fact) + 1 for fact in facts)
        filler: list[str] = []
        while room > 0:
            sentence = pick(rng, self._sentences) if self._sentences else filler_sentence(rng)
            filler.append(sentence)
            room -= len(sentence) + 1
        if len(filler) > 1:
            filler.pop()
        slots: list[list[str]] = [[] for _ in range(len(filler) + 1)]
        for fact in facts:
            slots[below(rng, len(slots))].append(fact)
        sentences = slots[0]
        for sentence, slot in zip(filler, slots[1:], strict=True):
            sentences.append(sentence)
            sentences += slot
        return " ".join(sentences)

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The first and the last values of the text."""
        values = [part[:3] for part in problem.prompt.split("#")[1:]]
        return [" ".join(values[: self.num_asked]), " ".join(values[-self.num_asked :])]


class Needles(Needle):
    """The same with two people asked for."""

    name: ClassVar[str] = "needles"
    num_asked: ClassVar[int] = 2


class Recall(Task):
    """Pairs `Ann=4 Bob=7` with questions for several: 8 pairs and 3 questions at level 1, 24 and 7 at level 5."""

    name: ClassVar[str] = "recall"
    domain: ClassVar[str] = "retrieval"

    def generate(self, rng: Random, level: int) -> Problem:
        people = draw(rng, NAMES, min(4 + 4 * level, len(NAMES)))
        value = {person: below(rng, 10 if level < 3 else 100) for person in people}
        asked = draw(rng, people, level + 2)
        pairs = " ".join(f"{person}={number}" for person, number in value.items())
        found = [f"{person}={value[person]}" for person in asked]
        return self.problem(
            f"pairs: {pairs}\nask: {', '.join(asked)}",
            [f"so {' '.join(found)}"],
            " ".join(str(value[person]) for person in asked),
            level=level,
            key=" ".join(sorted(found)),
        )

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The first values of the list."""
        values = [part.split()[0] for part in problem.prompt.split("=")[1:]]
        return [" ".join(values[: len(problem.answer.split())])]
