"""Python functions from a description and examples, graded by running them in the sandbox.

The function is run on inputs that its author does not see, all of them in one run; what it gives is compared here, on
this side of the sandbox. The inputs are the same for all problems, so that a text is run once whatever it answers.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import ClassVar

from openmimo.errors import SandboxError, nearest
from openmimo.tasks.problem import ANSWER_MARK, Problem, Task, between, draw, pick
from openmimo.tasks.sandbox import Level, Limits, Status, run_program

MAX_CHARACTERS = 4000
MAX_CACHED = 4096
LIMITS = Limits(seconds=3.0, memory_bytes=128 << 20, output_bytes=256 << 10, processes=4)
LEVEL_VARIABLE = "OPENMIMO_SANDBOX"
LOWEST, HIGHEST = -60, 120

# After the answer's own text. What it prints comes before the last line; an error in one call is no value for it.
CALLS = """

import json, sys
_outputs = []
for _values in json.loads(sys.stdin.readline()):
    try:
        _outputs.append(f(_values))
    except Exception:
        _outputs.append(None)
print()
print(json.dumps(_outputs))
"""

Values = list[int]


@dataclass(frozen=True)
class Step:
    """A condition on, or a change of, one number x: in words, in Python, and as it is computed here."""

    words: str
    code: str
    compute: Callable[[int], int]


@dataclass(frozen=True)
class Finish:
    """What becomes of the numbers: `code` gives it from {ys}, one list that the steps give."""

    words: str
    code: str
    compute: Callable[[Values], int | Values]


FINISHES = (
    Finish("the sum", "sum({ys})", sum),
    Finish("the largest, or 0", "max({ys}, default=0)", lambda ys: max(ys, default=0)),
    Finish("the smallest, or 0", "min({ys}, default=0)", lambda ys: min(ys, default=0)),
    Finish("the list", "{ys}", lambda ys: ys),
    Finish("the list backwards", "{ys}[::-1]", lambda ys: ys[::-1]),
    Finish("the sorted list", "sorted({ys})", sorted),
    Finish("the sum of the first 3", "sum({ys}[:3])", lambda ys: sum(ys[:3])),
    Finish("every second one from the first", "{ys}[::2]", lambda ys: ys[::2]),
    Finish(
        "the running sums",
        "ys = {ys}; return [sum(ys[:i + 1]) for i in range(len(ys))]",
        lambda ys: list(itertools.accumulate(ys)),
    ),
    Finish(
        "the differences of neighbours, later minus earlier",
        "ys = {ys}; return [b - a for a, b in zip(ys, ys[1:])]",
        lambda ys: [b - a for a, b in itertools.pairwise(ys)],
    ),
)
# Per level: conditions, changes, and how many of the finishes above.
SHAPES = {2: (1, 1, 4), 3: (1, 1, 8), 4: (2, 1, 8), 5: (2, 2, 10)}


class PythonFunction(Task):
    """A Python function `f(xs)` of a list of whole numbers: keep some, change them, give a sum or list of them.

    Level 2 has one condition, one change and four ways to finish, level 3 eight, level 4 two conditions, level 5 two
    changes and two finishes that take a second line of thought. The answer is one line after `answer:`, or a block in
    three backquotes that follows it. Any function is right that gives the right values on hidden lists, the empty one
    among them; it runs in the sandbox at FILTERED, or the level that the environment variable OPENMIMO_SANDBOX names.
    """

    name: ClassVar[str] = "python"
    domain: ClassVar[str] = "code"
    levels: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)

    def generate(self, rng: Random, level: int) -> Problem:
        while True:
            described = _draw(rng, level)
            examples = _draw_examples(rng, described)
            if examples:
                break
        shown = ", ".join(f"f({_text(values)})={_text(described.result(values))}" for values in examples)
        values = examples[0]
        kept = [x for x in values if described.keeps(x)]
        work = [
            *(f"keep {step.words}: {step.code}" for step in described.conditions),
            *(f"take {step.words}: {step.code}" for step in described.changes),
            f"f({_text(values)}): keep {_text(kept)} take {_text([described.change(x) for x in kept])} "
            f"give {_text(described.result(values))}",
        ]
        prompt = f"python f(xs): {described.words}. {shown}"
        return self.problem(prompt, work, described.code, level=level, key=described.key)

    def grade(self, problem: Problem, response: str) -> float:
        """1.0 when the function gives what the worked one gives on every hidden list.

        Raises: SandboxError when this machine cannot hold a program at the level that is needed.
        """
        text = program_text(response)
        if text is None:
            return 0.0
        if text == problem.answer:  # right by construction
            return 1.0
        outputs = outputs_of(text)
        return float(outputs is not None and outputs == _expected(problem.key, problem.level))

    def guesses(self, problem: Problem) -> Sequence[str]:
        """The list itself, and nothing."""
        return ["def f(xs): return xs", "def f(xs): return 0", "def f(xs): return []"]


@dataclass(frozen=True)
class Described:
    """A function by its parts."""

    conditions: tuple[Step, ...]
    changes: tuple[Step, ...]
    finish: Finish

    @property
    def words(self) -> str:
        return self._describe([step.words for step in self.conditions])

    @property
    def key(self) -> str:
        """The words, whichever condition is named first, with every bound as close to what is kept as it may be."""
        return self._describe(sorted(self._tight(step).words for step in self.conditions))

    def _tight(self, step: Step) -> Step:
        kind = step.words.split()[1]
        if kind not in ("above", "below"):
            return step
        others = [other for other in self.conditions if other is not step]
        bound, toward = int(step.words.split()[2]), 1 if kind == "above" else -1
        # Examples show that something is kept, so this ends.
        while not all(other.compute(bound + toward) for other in others):
            bound += toward
        return _condition(kind, bound)

    def _describe(self, kept: Sequence[str]) -> str:
        changes = ", then ".join(step.words for step in self.changes)
        return f"keep {' and '.join(kept)}; take {changes}; give {self.finish.words}"

    @property
    def code(self) -> str:
        change = self.changes[0].code
        for step in self.changes[1:]:
            change = re.sub(r"\bx\b", f"({change})", step.code)
        condition = " and ".join(step.code for step in self.conditions)
        body = self.finish.code.replace("{ys}", f"[{change} for x in xs if {condition}]")
        return f"def f(xs): {body}" if "return" in body else f"def f(xs): return {body}"

    def keeps(self, x: int) -> bool:
        return all(step.compute(x) for step in self.conditions)

    def change(self, x: int) -> int:
        for step in self.changes:
            x = step.compute(x)
        return x

    def result(self, values: Values) -> int | Values:
        return self.finish.compute([self.change(x) for x in values if self.keeps(x)])


def program_text(response: str) -> str | None:
    """The program that follows the last `answer:`, on its line or in a block below it; None if there is none to run."""
    lines = response.split("\n")
    for place in range(len(lines) - 1, -1, -1):
        line = lines[place].lstrip()
        if line.startswith(ANSWER_MARK):
            text = line.removeprefix(ANSWER_MARK).strip()
            if text in ("", "```", "```python"):
                text = _block(lines[place + 1 :] if not text else ["```", *lines[place + 1 :]])
            usable = len(text) <= MAX_CHARACTERS and re.search(r"\bf\b", text) is not None
            return text if usable and re.search(r"\bdef\b|=|\bimport\b", text) else None
    return None


def _block(lines: Sequence[str]) -> str:
    """The inside of the block that begins with the first line that is not empty."""
    start = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    if start == len(lines) or not lines[start].strip().startswith("```"):
        return ""
    end = next((i for i in range(start + 1, len(lines)) if lines[i].strip() == "```"), len(lines))
    return "\n".join(lines[start + 1 : end])


_cache: OrderedDict[str, str | None] = OrderedDict()


def outputs_of(text: str) -> str | None:
    """What the program's f gives on all hidden lists, as JSON; None when it ends before it has given them all.

    Remembered by text; a time-out is not, because a busy machine may be its cause.
    Raises: SandboxError as `run_program` does.
    """
    if text in _cache:
        _cache.move_to_end(text)
        return _cache[text]
    result = run_program(
        text + CALLS, stdin=json.dumps(hidden_lists()) + "\n", limits=LIMITS, required=required_level()
    )
    outputs = _last_line(result.stdout) if result.status == Status.OK else None
    if result.status != Status.TIMEOUT:
        _cache[text] = outputs
        if len(_cache) > MAX_CACHED:
            _cache.popitem(last=False)
    return outputs


def required_level() -> Level:
    """FILTERED, or what the environment variable names: limited, filtered or isolated.

    Raises: SandboxError for another word.
    """
    word = os.environ.get(LEVEL_VARIABLE, Level.FILTERED.name)
    known = {level.name.lower(): level for level in Level}
    if word.lower() not in known:
        raise SandboxError(f"{LEVEL_VARIABLE}={word}; {nearest(word.lower(), known)}")
    return known[word.lower()]


@lru_cache(maxsize=1)
def hidden_lists() -> list[Values]:
    """The empty list, every number alone, all of them, and random lists: short ones, and long ones that keep many."""
    rng = Random(20_251)
    everything = list(range(LOWEST, HIGHEST + 1))
    short = [[between(rng, LOWEST, HIGHEST) for _ in range(between(rng, 2, 12))] for _ in range(40)]
    long = [[between(rng, LOWEST, HIGHEST) for _ in range(60)] for _ in range(20)]
    return [[], *([x] for x in everything), everything, draw(rng, everything, len(everything)), *short, *long]


def _last_line(stdout: bytes) -> str | None:
    """JSON is compared as text: true is not 1 then, and nothing that a program writes is ever built here."""
    lines = stdout.rstrip(b"\n").rpartition(b"\n")
    return lines[2].decode("utf-8", "replace")


@lru_cache(maxsize=1024)  # a problem is graded once per sample of a group
def _expected(key: str, level: int) -> str:
    described = _read(key.removeprefix(f"{PythonFunction.name} "), level)
    return json.dumps([described.result(values) for values in hidden_lists()])


def _condition(kind: str, a: int, b: int = 0) -> Step:
    if kind == "divisible":
        return Step(f"numbers divisible by {a}", f"x % {a} == 0", lambda x: x % a == 0)
    if kind == "leaving":
        return Step(f"numbers that leave {b} when divided by {a}", f"x % {a} == {b}", lambda x: x % a == b)
    if kind == "above":
        return Step(f"numbers above {a}", f"x > {a}", lambda x: x > a)
    return Step(f"numbers below {a}", f"x < {a}", lambda x: x < a)


def _change(kind: str, a: int) -> Step:
    if kind == "times":
        return Step(f"{a} times the number", f"{a} * x", lambda x: a * x)
    if kind == "plus":
        return Step(f"the number plus {a}", f"x + {a}", lambda x: x + a)
    if kind == "minus":
        return Step(f"{a} minus the number", f"{a} - x", lambda x: a - x)
    if kind == "distance":
        return Step(f"the distance to {a}", f"abs(x - {a})", lambda x: abs(x - a))
    return Step(f"the remainder by {a}", f"x % {a}", lambda x: x % a)


def _draw(rng: Random, level: int) -> Described:
    num_conditions, num_changes, num_finishes = SHAPES[level]
    conditions: list[Step] = []
    for kind in draw(rng, ("divisible", "leaving", "above", "below"), num_conditions):
        a = between(rng, 2, 9) if kind in ("divisible", "leaving") else between(rng, 1, 60)
        conditions.append(_condition(kind, a, between(rng, 1, a - 1)))
    changes: list[Step] = []
    for kind in draw(rng, ("times", "plus", "minus", "distance", "remainder"), num_changes):
        changes.append(_change(kind, between(rng, 2, 9) if kind in ("times", "remainder") else between(rng, 1, 40)))
    return Described(tuple(conditions), tuple(changes), pick(rng, FINISHES[:num_finishes]))


def _draw_examples(rng: Random, described: Described) -> list[Values]:
    """Two lists of which the conditions keep some and drop some; none when they hardly keep anything."""
    found: list[Values] = []
    for _ in range(60):
        values = [between(rng, 0, 70) for _ in range(between(rng, 4, 6))]
        if 2 <= sum(map(described.keeps, values)) < len(values):
            found.append(values)
            if len(found) == 2:
                return found
    return []


def _read(words: str, level: int) -> Described:
    """The function that the words describe: a problem carries nothing else."""
    kept, taken, given = (part.partition(" ")[2] for part in words.split("; "))
    conditions: list[Step] = []
    for part in kept.split(" and "):
        numbers = [int(word) for word in part.split() if word.isdigit()]
        kind = "leaving" if "leave" in part else part.split()[1]
        conditions.append(_condition(kind, numbers[-1], numbers[0]))
    changes: list[Step] = []
    for part in taken.split(", then "):
        number = next(int(word) for word in part.split() if word.isdigit())
        kind = next(kind for kind in ("times", "plus", "minus", "distance", "remainder") if kind in part.split())
        changes.append(_change(kind, number))
    finish = next(finish for finish in FINISHES[: SHAPES[level][2]] if finish.words == given)
    return Described(tuple(conditions), tuple(changes), finish)


def _text(value: int | Values) -> str:
    return str(value).replace(" ", "")
