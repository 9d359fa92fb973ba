"""Accuracy per domain, with an engine that answers on command."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from openmimo import tasks
from openmimo.engine import Completion, DraftStats, Engine, SamplingParams
from openmimo.errors import RequestError, TaskError
from openmimo.evals import evaluate_domains, reports_as_json
from openmimo.model import build_model
from openmimo.tasks import Problem


class ScriptedEngine:
    """Answers the i-th prompt with `answer(i)`; prompts are whatever `render` made of the problem's text."""

    tokenizer = None

    def __init__(self, answer: Callable[[int], str]) -> None:
        self.answer = answer
        self.prompts: list[list[int]] = []

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        assert params.greedy
        self.prompts = prompts
        return [
            Completion(
                token_ids=(1, 2),
                text=self.answer(i),
                finish_reason="stop" if i % 2 else "length",
                draft=DraftStats((1, 0, 0, i % 2)),
            )
            for i in range(len(prompts))
        ]


def as_codes(text: str) -> list[int]:
    return [ord(c) for c in text]


def problems_of(domain: str, num: int) -> list[Problem]:
    return [tasks.sample_problem(domain, split="test", level=1, seed=5, index=i) for i in range(num)]


def test_worked_answers_get_full_marks_in_their_own_domain_only() -> None:
    """Catches completions dealt to the wrong domain or problem, and training problems in the test."""
    math, logic = problems_of("math", 12), problems_of("logic", 12)
    engine = ScriptedEngine(lambda i: math[i].solution if i < 12 else "answer: nonsense")
    reports = evaluate_domains(engine, domains=["math", "logic"], level=1, num_problems=12, seed=5, render=as_codes)
    assert engine.prompts == [as_codes(problem.prompt) for problem in math + logic]
    assert (reports["math"].accuracy, reports["logic"].accuracy) == (1.0, 0.0)
    assert set(reports["math"].by_task) == {problem.task for problem in math}
    assert set(reports["math"].by_task.values()) == {1.0}
    assert 0.0 < reports["math"].constant_baseline < 1.0
    sample = reports["math"].samples[0]
    assert (sample.prompt, sample.answer, sample.score) == (math[0].prompt, math[0].answer, 1.0)


def test_accuracy_and_draft_statistics_are_means_over_problems() -> None:
    """Catches a mean over tasks in place of problems, and acceptance averaged per answer in place of per step."""
    math = problems_of("math", 10)
    engine = ScriptedEngine(lambda i: math[i].solution if i < 3 else "")
    report = evaluate_domains(engine, domains=["math"], level=1, num_problems=10, seed=5, render=as_codes)["math"]
    assert report.accuracy == pytest.approx(0.3)
    assert report.stopped == 0.5
    assert report.num_tokens == 20
    assert report.acceptance_length == pytest.approx((10 * 1 + 5 * 4) / 15)
    right = {name: [p.task for p in math[:3]].count(name) for name in report.by_task}
    assert report.by_task == pytest.approx({n: right[n] / [p.task for p in math].count(n) for n in right})


def test_the_json_line_holds_every_figure() -> None:
    engine = ScriptedEngine(lambda i: "")
    reports = evaluate_domains(engine, domains=["code"], level=1, num_problems=4, seed=0, render=as_codes)
    line = reports_as_json(reports)
    assert "\n" not in line
    figures = json.loads(line)["domains"]["code"]
    assert figures["accuracy"] == 0.0
    assert figures["num_problems"] == 4
    assert figures["acceptance_length"] == round(reports["code"].acceptance_length, 3)
    assert "samples" not in figures


def test_senseless_evaluations_are_refused() -> None:
    engine = ScriptedEngine(lambda i: "")
    with pytest.raises(TaskError, match="did you mean 'math'"):
        evaluate_domains(engine, domains=["maths"], level=1, num_problems=1, seed=0, render=as_codes)
    with pytest.raises(RequestError, match="num_problems"):
        evaluate_domains(engine, domains=["math"], level=1, num_problems=0, seed=0, render=as_codes)
    with pytest.raises(RequestError, match="tokenizer"):
        evaluate_domains(engine, domains=["math"], level=1, num_problems=1, seed=0)


def test_a_real_engine_fits(tiny_config) -> None:
    """Catches an interface that only the scripted engine has."""
    engine = Engine(build_model(tiny_config, seed=0))
    reports = evaluate_domains(
        engine, domains=["math"], level=1, num_problems=2, seed=0, max_tokens=3, render=lambda text: [1, 2, 3]
    )
    assert reports["math"].num_tokens == 6
