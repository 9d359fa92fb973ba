"""`openmimo eval`: accuracy and draft acceptance per domain, and retrieval by length."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openmimo.cli.bench import parse_numbers, parse_words
from openmimo.cli.engine_options import Activations, CacheFormat, DraftHeads, ModelFolder, RunnerName, Verify, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from openmimo.evals import DomainReport
    from openmimo.evals.retrieval import RetrievalCell


class What(str, Enum):
    """What is asked."""

    DOMAINS = "domains"
    RETRIEVAL = "retrieval"


def eval_command(
    model: ModelFolder,
    what: Annotated[
        What, typer.Argument(help="domains: problems of each; retrieval: facts in texts of growing length.")
    ] = What.DOMAINS,
    domains: Annotated[str, typer.Option(help="Comma-separated domains.")] = "math,code,logic",
    level: Annotated[int, typer.Option(help="Difficulty, from 1.")] = 1,
    num: Annotated[int, typer.Option(help="Problems per domain, or per retrieval task and level.")] = 200,
    seed: Annotated[int, typer.Option(help="Chooses the problems.")] = 0,
    split: Annotated[str, typer.Option(help="test: problems never trained on; or train.")] = "test",
    max_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = 256,
    max_batch: Annotated[int, typer.Option(help="Answers written at the same time.")] = 32,
    draft_heads: DraftHeads = "auto",
    weights: Weights = "bf16",
    activations: Activations = "auto",
    cache: CacheFormat = "auto",
    runner: RunnerName = "auto",
    verify: Verify = False,
    samples: Annotated[int, typer.Option(help="Answers to show per domain, at most 4.")] = 0,
    tasks: Annotated[
        str, typer.Option(help="Tasks of retrieval, comma-separated.")
    ] = "needle,needles,needles4,track,pairs",
    levels: Annotated[str, typer.Option(help="Levels of retrieval; each doubles the text.")] = "1,2,3,4",
    native_length: Annotated[int, typer.Option(min=0, help="Tokens that the model was trained with at first.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the heat map of retrieval.")] = None,
) -> None:
    """Answer held-out problems greedily and grade them: a table, then one JSON line."""
    from rich.console import Console

    from openmimo.cli.chat import parse_draft_heads, printable
    from openmimo.engine import Engine
    from openmimo.evals import evaluate_domains, reports_as_json

    if plot is not None:
        from openmimo.reproduce.plots import demand_matplotlib

        demand_matplotlib()
    heads = parse_draft_heads(draft_heads)
    engine = Engine(
        model,
        draft_heads=heads,
        weights=weights,
        activations=activations,
        cache=cache,
        runner=runner,
        verify=verify,
        max_batch=max_batch,
    )
    if what is What.RETRIEVAL:
        from openmimo.evals.retrieval import measure_retrieval

        cells = measure_retrieval(
            engine,
            names=parse_words(tasks),
            levels=parse_numbers("--levels", levels),
            num_problems=num,
            seed=seed,
            split=split,
            max_tokens=max_tokens,
        )
        _show_retrieval(cells, native_length, plot)
        return
    names = parse_words(domains)
    reports = evaluate_domains(
        engine, domains=names, level=level, num_problems=num, seed=seed, split=split, max_tokens=max_tokens
    )
    for name, report in reports.items():
        for sample in report.samples[:samples]:
            text = f"--- {name}, score {sample.score:g}, expected {sample.answer}\n{sample.prompt}\n{sample.response}"
            typer.echo(printable(text))
    Console(highlight=False).print(reports_table(reports))
    typer.echo(reports_as_json(reports))


def _show_retrieval(cells: list[RetrievalCell], native_length: int, plot: Path | None) -> None:
    from openmimo.evals.measuring import describe_machine, print_table
    from openmimo.evals.retrieval import retrieval_rows

    print_table(*retrieval_rows(cells, native_length))
    if plot is not None:
        from openmimo.reproduce.plots import plot_retrieval

        plot_retrieval(cells, plot, native_length)
    figures = {"retrieval": [asdict(cell) for cell in cells], "native_length": native_length}
    typer.echo(json.dumps({**figures, "machine": asdict(describe_machine())}))


def reports_table(reports: Mapping[str, DomainReport]) -> Table:
    """One line per domain, then its tasks."""
    from rich.table import Table

    table = Table("domain", "accuracy", "best constant", "tokens per step", "stopped")
    for name, report in reports.items():
        row = (report.accuracy, report.constant_baseline)
        table.add_row(name, *map(_percent, row), f"{report.acceptance_length:.2f}", _percent(report.stopped))
        for task, accuracy in report.by_task.items():
            table.add_row(f"  {task}", _percent(accuracy), style="dim")
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
