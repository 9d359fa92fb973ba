"""The report's Figure 7 in small: how acceptance length falls as the next token becomes harder to foretell.

x is the mean of -log p over the tokens that the model wrote, p being the distribution that each was drawn from,
temperature included: the cross-entropy of the text, whose expectation is the entropy. A draft is kept with probability
p(draft), so this is the distribution that matters, whatever temperature flattened it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from openmimo import tasks
from openmimo.data.files import PYTHON_STDLIB, find_files, shuffled
from openmimo.engine import DraftStats, Engine, SamplingParams
from openmimo.errors import RequestError
from openmimo.evals.accuracy import chat_renderer
from openmimo.evals.measuring import print_table
from openmimo.reproduce.acceptance_curve import (
    LEAST_POINTS,
    REPORT_CURVE,
    REPORT_R_SQUARED,
    AcceptanceCurve,
    fit_curve,
)

TEXT_GROUP = "text"
# Tokens of a file that a continuation of it starts from, and characters that surely hold as many.
TEXT_TOKENS, TEXT_CHARACTERS = 64, 2000


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Prompts of one kind and the temperature at which they are answered; `group` is the domain, or "text"."""

    name: str
    group: str
    temperature: float
    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class FigurePoint:
    """A dataset's place in the figure. `histogram[n]` steps kept n drafts.

    Units: `cross_entropy` in nats a token, `acceptance_length` in tokens a step.
    """

    name: str
    group: str
    temperature: float
    cross_entropy: float
    acceptance_length: float
    histogram: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The curve through the points of one temperature."""

    temperature: float
    curve: AcceptanceCurve
    r_squared: float


@dataclass(frozen=True, kw_only=True)
class Figure7:
    """All points, the curve through them, and how well it and the report's curve fit.

    `by_temperature` has the temperatures with enough points for a curve of their own, when there are several.
    """

    points: tuple[FigurePoint, ...]
    curve: AcceptanceCurve
    r_squared: float
    r_squared_of_report_curve: float
    by_temperature: tuple[Fit, ...]


def figure_datasets(
    engine: Engine,
    *,
    domains: Sequence[str],
    levels: Sequence[int],
    temperatures: Sequence[float],
    num_prompts: int,
    seed: int = 0,
) -> list[Dataset]:
    """Every task of the domains at every level it has, and Python sources to continue, at every temperature.

    Problems are of the test split. Raises: TaskError for an unknown domain or level, RequestError without a tokenizer.
    """
    render = chat_renderer(engine)
    groups: dict[tuple[str, str], list[list[int]]] = {}
    for domain in domains:
        for level in levels:
            for task in tasks.tasks(domain, level=level):
                problems = [
                    tasks.sample_problem(domain, split="test", level=level, seed=seed, index=index, task=task.name)
                    for index in range(num_prompts)
                ]
                groups[domain, f"{task.name} {level}"] = [render(problem.prompt) for problem in problems]
    groups[TEXT_GROUP, PYTHON_STDLIB] = _text_prompts(engine, num_prompts, seed)
    return [
        Dataset(name=name, group=group, temperature=temperature, prompts=tuple(map(tuple, prompts)))
        for (group, name), prompts in groups.items()
        for temperature in temperatures
    ]


def measure_figure7(engine: Engine, datasets: Sequence[Dataset], *, max_tokens: int = 128, seed: int = 0) -> Figure7:
    """Answer every dataset with all heads drafting in every step, and fit the curve.

    Raises: RequestError if the model has no heads or a temperature is 0, where nothing is drawn.
    """
    num_heads = engine.config.num_mtp_heads
    if num_heads == 0:
        raise RequestError("the model has no MTP heads, so there is no acceptance; train some (`mtp_heads`)")
    if any(dataset.temperature <= 0 for dataset in datasets):
        raise RequestError("temperature 0 draws nothing, so its text has no cross-entropy; give temperatures above 0")
    drafting = engine.with_drafts(num_heads)
    points = [_measure(drafting, dataset, max_tokens, seed) for dataset in datasets]
    points = sorted(filter(None, points), key=lambda point: point.cross_entropy)
    curve, r_squared = _fit(points, num_heads)
    groups = {
        temperature: [point for point in points if point.temperature == temperature]
        for temperature in sorted({point.temperature for point in points})
    }
    fits = {
        temperature: _fit(group, num_heads)
        for temperature, group in groups.items()
        if len(set(_coordinates(group)[0])) >= LEAST_POINTS
    }
    return Figure7(
        points=tuple(points),
        curve=curve,
        r_squared=r_squared,
        r_squared_of_report_curve=REPORT_CURVE.r_squared(*_coordinates(points)),
        by_temperature=tuple(Fit(temperature=t, curve=c, r_squared=r) for t, (c, r) in fits.items() if len(groups) > 1),
    )


def print_figure7(figure: Figure7) -> None:
    """One line per dataset, from the most predictable on, then both curves."""
    rows = [
        (p.group, p.name, p.temperature, p.cross_entropy, p.acceptance_length, figure.curve.at(p.cross_entropy))
        for p in figure.points
    ]
    print_table(("domain", "dataset", "temperature", "cross-entropy", "tokens/step", "curve"), rows)
    print(f"fit to {len(rows)} datasets: y = {figure.curve}, R2 = {figure.r_squared:.3f}")
    for fit in figure.by_temperature:
        print(f"  at temperature {fit.temperature:g}: y = {fit.curve}, R2 = {fit.r_squared:.3f}")
    print(
        f"MiMo-V2-Flash report: y = {REPORT_CURVE}, R2 = {REPORT_R_SQUARED:g} on its own datasets; "
        f"R2 = {figure.r_squared_of_report_curve:.3f} on these"
    )


def write_figure7(figure: Figure7, path: Path, about: Mapping[str, object]) -> None:
    """All that the table shows, as JSON."""
    report = {**asdict(REPORT_CURVE), "r_squared": REPORT_R_SQUARED}
    content = {"figure": 7, **about, **asdict(figure), "report": report}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _coordinates(points: Sequence[FigurePoint]) -> tuple[list[float], list[float]]:
    return [point.cross_entropy for point in points], [point.acceptance_length for point in points]


def _fit(points: Sequence[FigurePoint], num_heads: int) -> tuple[AcceptanceCurve, float]:
    x, y = _coordinates(points)
    curve = fit_curve(x, y, num_heads=num_heads)
    return curve, curve.r_squared(x, y)


def _measure(engine: Engine, dataset: Dataset, max_tokens: int, seed: int) -> FigurePoint | None:
    """None if every answer was a single token, so that no step verified drafts."""
    params = SamplingParams(temperature=dataset.temperature, max_tokens=max_tokens, seed=seed, logprobs=True)
    completions = engine.generate(dataset.prompts, params)
    logprobs = [value for completion in completions for value in completion.logprobs or ()]
    stats = DraftStats.merge(completion.draft for completion in completions)
    if stats.num_steps == 0:
        return None
    return FigurePoint(
        name=dataset.name,
        group=dataset.group,
        temperature=dataset.temperature,
        cross_entropy=max(0.0, -sum(logprobs) / len(logprobs)),
        acceptance_length=stats.acceptance_length,
        histogram=stats.histogram,
        num_tokens=len(logprobs),
    )


def _text_prompts(engine: Engine, num_prompts: int, seed: int) -> list[list[int]]:
    """The beginnings of as many files of the standard library, in an order that the seed decides."""
    assert engine.tokenizer is not None
    files = find_files([PYTHON_STDLIB])
    order = (files[index].path for index in shuffled(len(files), "figure7", seed))
    texts = (path.read_text(encoding="utf-8", errors="replace")[:TEXT_CHARACTERS] for path in order)
    prompts = (engine.tokenizer.encode(text)[:TEXT_TOKENS] for text in texts)
    return list(islice((ids for ids in prompts if len(ids) == TEXT_TOKENS), num_prompts))
