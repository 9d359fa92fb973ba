"""`openmimo eval`: accuracy and draft acceptance per domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from openmimo.cli.engine_options import Activations, CacheFormat, DraftHeads, ModelFolder, RunnerName, Verify, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from openmimo.evals import DomainReport


def eval_command(
    model: ModelFolder,
    domains: Annotated[str, typer.Option(help="Comma-separated domains.")] = "math,code,logic",
    level: Annotated[int, typer.Option(help="Difficulty, from 1.")] = 1,
    num: Annotated[int, typer.Option(help="Problems per domain.")] = 200,
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
) -> None:
    """Answer held-out problems greedily and grade them: a table, then one JSON line."""
    from rich.console import Console

    from openmimo.cli.chat import parse_draft_heads, printable
    from openmimo.engine import Engine
    from openmimo.evals import evaluate_domains, reports_as_json

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
    names = [name.strip() for name in domains.split(",") if name.strip()]
    reports = evaluate_domains(
        engine, domains=names, level=level, num_problems=num, seed=seed, split=split, max_tokens=max_tokens
    )
    for name, report in reports.items():
        for sample in report.samples[:samples]:
            text = f"--- {name}, score {sample.score:g}, expected {sample.answer}\n{sample.prompt}\n{sample.response}"
            typer.echo(printable(text))
    Console(highlight=False).print(reports_table(reports))
    typer.echo(reports_as_json(reports))


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
