"""Retrieval: facts about people and chains of values hidden in long text, and lists of pairs to look things up in."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from string import ascii_lowercase
from typing import ClassVar

from openmimo.errors import TaskError
from openmimo.tasks.problem import NAMES, Problem, Task, below, between, draw, pick

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Characters of the text at levels 1 to 8."""

SUBJECTS = ("fox", "owl", "cat", "dog", "hen", "ant", "bee", "cow")
ACTIONS = ("sleeps", "sings", "waits", "runs", "hides", "plays")
PLACES = ("by the pond", "in the barn", "near the road", "on the hill", "at the mill", "under the tree")


# Words of one token each in a small vocabulary: many different ones, because a model with few keys and values to tell
# apart learns them one by one instead of learning to look up.
_WORD_LIST = (
    "acid arch army aunt axle baby back ball band bank barn bath bead beam bear beer bell belt bird boat body "
    "bolt bone book boot bowl cake calf camp cape cart cave chin city clay club coal coat coin cook copper cord "
    "cork corn crab crow cube curl dawn deck deer desk dish dock door dove drum duck dust east edge face farm "
    "fern film fire fish flag foam fork fort frog gate gift goat gold gull hail hall hand harp hawk hill hoof "
    "horn ice inn iron jade jar jug kite knot lake lamb lamp leaf lime lion lock loom mask mast mill mint moon "
    "moss nail nest north oak oar palm path peak pear pine"
)
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())


def filler_sentence(rng: Random) -> str:
    """`The fox sleeps by the pond.`"""
    return f"The {pick(rng, SUBJECTS)} {pick(rng, ACTIONS)} {pick(rng, PLACES)}."


def draw_keys(rng: Random, count: int) -> list[str]:
    """Different words of three letters. Faster than `draw`, because there are so many of them."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(pick(rng, ascii_lowercase) for _ in range(3))] = None
    return list(keys)


def haystack(
    rng: Random, facts: Sequence[str], num_characters: int, *, sentences: Sequence[str] = (), in_order: bool = False
) -> str:
    """The facts between filler sentences (of `sentences`, if given), in any order or as they come."""
    room = num_characters - sum(len(fact) + 1 for fact in facts)
    filler: list[str] = []
    while room > 0:
        sentence = pick(rng, sentences) if sentences else filler_sentence(rng)
        filler.append(sentence)
        room -= len(sentence) + 1
    if len(filler) > 1:
        filler.pop()
    places = [below(rng, len(filler) + 1) for _ in facts]
    slots: list[list[str]] = [[] for _ in range(len(filler) + 1)]
    for fact, place in zip(facts, sorted(places) if in_order else places, strict=True):
        slots[place].append(fact)
    text = slots[0]
    for sentence, slot in zip(filler, slots[1:], strict=True):
        text += [sentence, *slot]
    return " ".join(text)


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
        text = haystack(rng, [f"{fact}." for fact in facts], LENGTHS[level - 1], sentences=self._sentences)
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

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The first and the last values of the text."""
        values = [part[:3] for part in problem.prompt.split("#")[1:]]
        return [" ".join(values[: self.num_asked]), " ".join(values[-self.num_asked :])]


class Needles(Needle):
    """The same with two people asked for."""

    name: ClassVar[str] = "needles"
    num_asked: ClassVar[int] = 2


class AllNeedles(Needle):
    """The same with four people asked for."""

    name: ClassVar[str] = "needles4"
    num_asked: ClassVar[int] = 4


class Track(Task):
    """Values that are passed on, `Set pqr to 47.` and later `Set xyz to pqr.`, between filler sentences.

    The question names the end of one of four chains of three; the text is as long as that of `Needle`.
    """

    name: ClassVar[str] = "track"
    domain: ClassVar[str] = "retrieval"
    levels: ClassVar[tuple[int, ...]] = tuple(range(1, len(LENGTHS) + 1))
    chains: ClassVar[int] = 4
    steps: ClassVar[int] = 3

    def generate(self, rng: Random, level: int) -> Problem:
        names = draw_keys(rng, self.chains * self.steps)
        values = [str(number) for number in draw(rng, range(10, 100), self.chains)]
        chains = [names[start : start + self.steps] for start in range(0, len(names), self.steps)]
        links = [list(zip(chain, [value, *chain], strict=False)) for chain, value in zip(chains, values, strict=True)]
        # Which chain goes on next.
        order = draw(rng, [chain for chain in range(self.chains) for _ in range(self.steps)], len(names))
        waiting = [iter(chain) for chain in links]
        facts = ["Set {} to {}.".format(*next(waiting[chain])) for chain in order]
        asked = below(rng, self.chains)
        back = [f"{name} is {source}" for name, source in reversed(links[asked])]
        return self.problem(
            f"read: {haystack(rng, facts, LENGTHS[level - 1], in_order=True)}\nask: {chains[asked][-1]}",
            [f"so {', '.join(back)}"],
            values[asked],
            level=level,
            key=" ".join(f"{name}={source}" for name, source in links[asked]),
        )

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The first and the last value of the text."""
        values = [word.rstrip(".") for word in problem.prompt.split() if word.rstrip(".").isdecimal()]
        return [values[0], values[-1]]


class Pairs(Task):
    """A list of pairs `pqr=47` as long as the text of `Needle`, with questions for three of them."""

    name: ClassVar[str] = "pairs"
    domain: ClassVar[str] = "retrieval"
    levels: ClassVar[tuple[int, ...]] = tuple(range(1, len(LENGTHS) + 1))
    num_asked: ClassVar[int] = 3

    def generate(self, rng: Random, level: int) -> Problem:
        names = draw_keys(rng, LENGTHS[level - 1] // len("pqr=47 "))
        value = {name: str(between(rng, 10, 99)) for name in names}
        asked = draw(rng, names, self.num_asked)
        found = [f"{name}={value[name]}" for name in asked]
        return self.problem(
            f"pairs: {' '.join(f'{name}={number}' for name, number in value.items())}\nask: {', '.join(asked)}",
            [f"so {' '.join(found)}"],
            " ".join(value[name] for name in asked),
            level=level,
            key=" ".join(sorted(found)),
        )

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The first values of the list."""
        values = [part.split()[0] for part in problem.prompt.split("=")[1:]]
        return [" ".join(values[: self.num_asked])]


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


class Recite(Task):
    """Pairs of words `moon harp,` which are asked for several times each: the densest lesson in looking things up.

    Four pairs and twelve questions at level 1. At level 2 one or two words stand between the words of a pair, `moon has
    a harp,`, so that what is looked up has to be carried along. Levels 3 and 4 are the same with twice as many pairs
    and questions, level 5 is level 4 with twice as many again. The answer is the last value.
    """

    name: ClassVar[str] = "recite"
    domain: ClassVar[str] = "retrieval"
    times_asked: ClassVar[int] = 3
    links: ClassVar[tuple[str, ...]] = (" has", " has a")

    def generate(self, rng: Random, level: int) -> Problem:
        count = 4 << (level - 1) // 2
        words = draw(rng, WORDS, 2 * count)
        value = dict(zip(words[::2], words[1::2], strict=True))
        names, link = list(value), "" if level in (1, 3) else pick(rng, self.links)
        asked = [pick(rng, names) for _ in range(self.times_asked * count)]
        return self.problem(
            f"pairs: {', '.join(f'{name}{link} {word}' for name, word in value.items())}\nask: {' '.join(asked)}",
            [f"so {', '.join(f'{name}{link} {value[name]}' for name in asked)}"],
            value[asked[-1]],
            level=level,
            key=" ".join(sorted(f"{name}={word}" for name, word in value.items())),
        )

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The first and the last value of the list."""
        pairs = problem.prompt.removeprefix("pairs: ").partition("\n")[0].split(", ")
        return [pairs[0].split()[-1], pairs[-1].split()[-1]]
