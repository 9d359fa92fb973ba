"""How many problems of each domain a model answers, and how well its drafts are accepted while it does."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from openmimo import tasks
from openmimo.engine import Completion, DraftStats, Engine, SamplingParams
from openmimo.errors import RequestError
from openmimo.tasks import Problem
from openmimo.text import ChatTemplate, Tokenizer

NUM_SAMPLES = 4
"""Worked samples kept in a report."""


@dataclass(frozen=True, kw_only=True)
class EvalSample:
    """One problem, what the model wrote and what it was worth in [0, 1]."""

    prompt: str
    response: str
    answer: str
    score: float


@dataclass(frozen=True, kw_only=True)
class DomainReport:
    """A domain's figures.

    `accuracy` is the mean score; `constant_baseline` what the best answers that ignore the problem would get;
    `by_task` the accuracy of each task of the domain; `stopped` the share of answers that ended by themselves.
    """

    accuracy: float
    constant_baseline: float
    acceptance_length: float
    acceptance_per_head: tuple[float, ...]
    num_problems: int
    num_tokens: int
    stopped: float
    by_task: Mapping[str, float]
    samples: tuple[EvalSample, ...]


def evaluate_domains(
    engine: Engine,
    *,
    domains: Sequence[str],
    level: int,
    num_problems: int,
    seed: int,
    split: str = "test",
    max_tokens: int = 256,
    temperature: float = 0.0,
    render: Callable[[str], list[int]] | None = None,
) -> dict[str, DomainReport]:
    """Answer `num_problems` problems of every domain once and grade them: greedily, or drawn at a temperature.

    All domains share one call of the engine, so that its rows stay full. `render` turns a problem's prompt into
    token ids; by default it becomes the user's turn of a chat.
    Raises: TaskError for an unknown domain or level, RequestError if the engine has no tokenizer
    or there is nothing to answer.
    """
    if num_problems < 1:
        raise RequestError(f"num_problems={num_problems} must be at least 1")
    if not domains:
        raise RequestError(f"no domains; name some of {', '.join(tasks.domains())}")
    render = render or chat_renderer(engine)
    problems = {
        domain: [
            tasks.sample_problem(domain, split=split, level=level, seed=seed, index=index)
            for index in range(num_problems)
        ]
        for domain in dict.fromkeys(domains)
    }
    prompts = [render(problem.prompt) for group in problems.values() for problem in group]
    completions = iter(
        engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed))
    )
    return {
        domain: _report(
            group,
            [next(completions) for _ in group],
            tasks.constant_baseline(domain, level=level, split=split, seed=seed),
        )
        for domain, group in problems.items()
    }


def chat_renderer(engine: Engine) -> Callable[[str], list[int]]:
    """Turns a text into the token ids of a chat in which the assistant answers next."""
    if not isinstance(engine.tokenizer, Tokenizer):
        raise RequestError("chat prompts need the model's tokenizer; load the engine from a folder that has one")
    template = ChatTemplate(engine.tokenizer)
    return lambda text: template.render([{"role": "user", "content": text}])


def reports_as_json(reports: Mapping[str, DomainReport]) -> str:
    """One JSON line, without the samples."""
    figures = {
        domain: {
            "accuracy": round(report.accuracy, 4),
            "constant_baseline": round(report.constant_baseline, 4),
            "acceptance_length": round(report.acceptance_length, 3),
            "acceptance_per_head": [round(share, 3) for share in report.acceptance_per_head],
            "num_problems": report.num_problems,
            "num_tokens": report.num_tokens,
            "stopped": round(report.stopped, 4),
            "by_task": {name: round(value, 4) for name, value in report.by_task.items()},
        }
        for domain, report in reports.items()
    }
    return json.dumps({"domains": figures})


def _report(problems: Sequence[Problem], completions: Sequence[Completion], baseline: float) -> DomainReport:
    scores = [tasks.grade_response(p, c.text) for p, c in zip(problems, completions, strict=True)]
    by_task: defaultdict[str, list[float]] = defaultdict(list)
    for problem, score in zip(problems, scores, strict=True):
        by_task[problem.task].append(score)
    draft = DraftStats.merge(completion.draft for completion in completions)
    rows = list(zip(problems, completions, scores, strict=True))[:NUM_SAMPLES]
    return DomainReport(
        accuracy=_mean(scores),
        constant_baseline=baseline,
        acceptance_length=draft.acceptance_length,
        acceptance_per_head=draft.per_head,
        num_problems=len(problems),
        num_tokens=sum(len(completion.token_ids) for completion in completions),
        stopped=_mean([float(completion.finish_reason == "stop") for completion in completions]),
        by_task={name: _mean(values) for name, values in sorted(by_task.items())},
        samples=tuple(EvalSample(prompt=p.prompt, response=c.text, answer=p.answer, score=s) for p, c, s in rows),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
