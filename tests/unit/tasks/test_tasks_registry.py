"""The stream of problems: pure, split by key, wide enough, and fair to trivially equivalent problems."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest

from openmimo import tasks as package
from openmimo.errors import TaskError
from openmimo.tasks import Problem, domains, find_task, grade_response, in_test, sample_problem, tasks
from openmimo.tasks.circuits import Circuit
from openmimo.tasks.knights import Claim
from openmimo.tasks.retrieval import LENGTHS, Needle

PRINT_PROBLEMS = """
from openmimo.tasks import domains, sample_problem
where = [(d, s, i) for d in domains() for s in ("train", "test") for i in range(9)]
print([sample_problem(d, split=s, level=2, seed=5, index=i) for d, s, i in where])
"""


def test_problems_do_not_depend_on_the_process_or_on_earlier_calls() -> None:
    """Catches seeds from Python's own hash, and state kept between calls."""
    outputs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PRINT_PROBLEMS]
        outputs.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    here = [
        sample_problem(domain, split=split, level=2, seed=5, index=index)
        for domain in domains()
        for split in ("train", "test")
        for index in reversed(range(9))
    ]
    again = [p for start in range(0, len(here), 9) for p in reversed(here[start : start + 9])]
    assert outputs[0] == outputs[1] == f"{again}\n"


@pytest.mark.parametrize("domain", domains())
def test_train_and_test_share_no_key_and_no_prompt(domain: str) -> None:
    """Catches a split by anything that two equal prompts may not share."""
    train = [sample_problem(domain, split="train", level=1, seed=0, index=i) for i in range(3000)]
    test = [sample_problem(domain, split="test", level=1, seed=0, index=i) for i in range(600)]
    assert not {p.key for p in train} & {p.key for p in test}
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert not any(in_test(p.key) for p in train)
    assert all(in_test(p.key) for p in test)
    assert {p.task for p in test} == {task.name for task in tasks(domain, level=1)}


@pytest.mark.parametrize(("domain", "task"), [(d, t.name) for d in domains() for t in tasks(d, level=1)])
def test_a_tenth_of_at_least_two_thousand_keys_is_for_tests(domain: str, task: str) -> None:
    """Catches a task whose test problems would run out, and a lopsided split."""
    generator, rng, keys = find_task(domain, task), Random(3), set[str]()
    for _ in range(12_000):
        keys.add(generator.generate(rng, 1).key)
        if len(keys) >= 2000:
            break
    assert len(keys) >= 2000
    assert 0.07 < sum(map(in_test, keys)) / len(keys) < 0.13


def test_streams_differ_by_seed_index_and_split() -> None:
    """Catches an argument that the seed forgets."""
    base = {"split": "train", "level": 1, "seed": 0, "index": 0, "task": "add"}
    changes = [{}, {"seed": 1}, {"index": 1}, {"split": "test"}]
    assert len({sample_problem("math", **{**base, **change}).prompt for change in changes}) == 4


class Scripted(Random):
    """Gives the listed numbers, then 0.7."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(0)
        self._values = list(values)

    def random(self) -> float:
        return self._values.pop(0) if self._values else 0.7


def test_equivalent_problems_have_one_key() -> None:
    """Catches keys that tell a+b from b+a, or one list of statements from its shuffle."""
    generate = find_task("math", "add").generate
    # 110+107 and 107+110: total 217 both times, left 110 or 107.
    first = generate(Scripted([17.5 / 800, 10.5 / 18]), 1)
    second = generate(Scripted([17.5 / 800, 7.5 / 18]), 1)
    assert (first.prompt, second.prompt) == ("110+107=?", "107+110=?")
    assert first.key == second.key
    shuffled = {find_task("logic", "order").generate(Scripted([0.0] * 4 + [r]), 1) for r in (0.1, 0.5, 0.9)}
    assert len({p.prompt for p in shuffled}) == 3
    assert len({p.key for p in shuffled}) == 1


def test_circuits_with_swapped_operands_or_renamed_inputs_have_one_key() -> None:
    """Catches circuit keys that depend on names or on the side of an operand."""
    keys = {Circuit.shape(bits, gates) for bits, gates in (
        ({"a": 0, "b": 1, "c": 1}, [("e", "and", "a", "b"), ("f", "or", "e", "c")]),
        ({"a": 0, "b": 1, "c": 1}, [("e", "and", "b", "a"), ("f", "or", "c", "e")]),
        ({"c": 0, "b": 1, "a": 1}, [("e", "and", "c", "b"), ("f", "or", "a", "e")]),
    )}  # fmt: skip
    assert len(keys) == 1
    assert Circuit.shape({"a": 1, "b": 1, "c": 1}, [("e", "and", "a", "b"), ("f", "or", "e", "c")]) not in keys


def test_knights_claims_read_as_they_are_said() -> None:
    """Catches a verdict that ignores the speaker."""
    roles = {"Ann": 1, "Bob": 0}
    assert not Claim("Ann", "same", "Bob").fits(roles)
    assert Claim("Bob", "same", "Ann").fits(roles)
    assert Claim("Ann", "knave", "Bob").fits(roles)
    assert Claim("Bob", "knave", "Ann").fits(roles)


@pytest.mark.parametrize("level", range(1, 9))
def test_haystacks_have_the_stated_length_and_each_fact_once(level: int) -> None:
    """Catches text that is too long or short for its level, and answers that are not in it."""
    for task in ("needle", "needles", "needles4"):
        for index in range(5):
            problem = sample_problem("retrieval", split="test", level=level, seed=1, index=index, task=task)
            text, _, question = problem.prompt.removeprefix("read: ").partition("\nask: ")
            assert LENGTHS[level - 1] - 60 <= len(text) <= LENGTHS[level - 1]
            found = [text.split(f"{person} has #") for person in question.split(", ")]
            assert all(len(parts) == 2 for parts in found)
            assert " ".join(parts[1][:3] for parts in found) == problem.answer
            assert text.count("#") == min(level + 3, 10)
            assert len(found) == {"needle": 1, "needles": 2, "needles4": 4}[task]


def test_supplied_sentences_fill_the_haystack() -> None:
    """Catches filler that is ignored, and filler that could pass for a fact."""
    problem = Needle(["Rain fell."]).generate(Random(1), 2)
    assert problem.prompt.count("Rain fell.") > 30
    assert "The " not in problem.prompt
    assert grade_response(problem, problem.solution) == 1.0
    for bad in ("Ann has #111.", " "):
        with pytest.raises(TaskError, match="filler sentence"):
            Needle([bad])


@pytest.mark.parametrize("level", [1, 4, 8])
def test_tracked_values_are_those_of_a_program_that_runs_the_text(level: int) -> None:
    """Catches a link before the one that it follows, a chain that another one touches, and a text of another length."""
    for index in range(10):
        problem = sample_problem("retrieval", split="test", level=level, seed=1, index=index, task="track")
        text, _, question = problem.prompt.removeprefix("read: ").partition("\nask: ")
        assert LENGTHS[level - 1] - 60 <= len(text) <= LENGTHS[level - 1]
        value: dict[str, str] = {}
        for name, source in re.findall(r"Set (\w+) to (\w+)\.", text):
            value[name] = source if source.isdecimal() else value[source]
        assert value[question] == problem.answer
        assert sorted(Counter(value.values()).values()) == [3, 3, 3, 3]
        assert problem.solution.splitlines()[0].count(" is ") == 3


@pytest.mark.parametrize("level", [1, 4, 8])
def test_pairs_are_as_many_as_fit_and_each_name_is_there_once(level: int) -> None:
    """Catches a name with two values, and answers in the order of the list."""
    problem = sample_problem("retrieval", split="test", level=level, seed=1, index=level, task="pairs")
    pairs, _, question = problem.prompt.removeprefix("pairs: ").partition("\nask: ")
    table = dict(pair.split("=") for pair in pairs.split())
    assert len(table) == len(pairs.split())
    assert LENGTHS[level - 1] - 8 <= len(pairs) <= LENGTHS[level - 1]
    assert problem.answer.split() == [table[name] for name in question.split(", ")]


def test_recall_answers_are_the_pairs_asked_for() -> None:
    """Catches an answer in the order of the list instead of the question."""
    for index in range(50):
        problem = sample_problem("retrieval", split="train", level=1, seed=2, index=index, task="recall")
        pairs, _, question = problem.prompt.removeprefix("pairs: ").partition("\nask: ")
        table = dict(pair.split("=") for pair in pairs.split())
        assert len(table) == 8
        assert problem.answer.split() == [table[person] for person in question.split(", ")]


@pytest.mark.parametrize("level", [1, 2, 3, 5])
def test_recite_states_the_value_of_every_name_asked_for(level: int) -> None:
    """Catches a value of another name, a name that is also a value, and fewer pairs than the level has."""
    problem = sample_problem("retrieval", split="train", level=level, seed=3, index=level, task="recite")
    pairs, _, question = problem.prompt.removeprefix("pairs: ").partition("\nask: ")
    table = {pair.split()[0]: pair for pair in pairs.split(", ")}
    values = {pair.split()[-1] for pair in table.values()}
    assert len(table) == len(values) == {1: 4, 2: 4, 3: 8, 5: 16}[level]
    assert not set(table) & values
    assert {len(pair.split()) for pair in table.values()} <= ({2} if level in (1, 3) else {3, 4})
    names = question.split()
    assert len(names) == 3 * len(table)
    assert problem.solution.splitlines()[0].removeprefix("so ").split(", ") == [table[name] for name in names]
    assert problem.answer == table[names[-1]].split()[-1]


def test_unknown_names_get_a_hint() -> None:
    """Catches errors without the nearest name, or none at all."""
    ask = {"split": "train", "level": 1, "seed": 0, "index": 0}
    with pytest.raises(TaskError, match="did you mean 'math'"):
        sample_problem("maths", **ask)
    with pytest.raises(TaskError, match="did you mean 'subtract'"):
        sample_problem("math", **ask, task="substract")
    with pytest.raises(TaskError, match="levels are 1-5"):
        sample_problem("math", **{**ask, "level": 9})
    with pytest.raises(TaskError, match="levels are 2-5"):
        sample_problem("math", **ask, task="gcd")
    with pytest.raises(TaskError, match="expected 'train' or 'test'"):
        sample_problem("math", **{**ask, "split": "valid"})
    with pytest.raises(TaskError, match="unknown task"):
        grade_response(Problem("", "", "", "math", "nothing", 1, ""), "answer: 1")


def test_public_names_exist() -> None:
    """Catches an export that was renamed."""
    assert all(hasattr(package, name) for name in package.__all__)
