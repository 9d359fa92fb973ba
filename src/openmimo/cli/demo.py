"""`openmimo demo`: a model learns arithmetic, code and logic from nothing, then answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from openmimo.evals import DomainReport
    from openmimo.evals.speed import SpeedReport
    from openmimo.train.loop import TrainResult

DOMAINS = ("math", "code", "logic")
# In the package, so that an installed one has it; `recipes/` of the repository links there.
RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"


def demo_command(
    out: Annotated[Path, typer.Option(help="Run folder; an earlier run in it is replaced.")] = Path("runs/demo"),
    recipe: Annotated[Path | None, typer.Option(help="Training recipe; by default the package's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and problems.")] = 0,
    num: Annotated[int, typer.Option(help="Held-out problems per domain.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="Recipe overrides, such as stages.0.steps=100.")] = None,
) -> None:
    """Pre-train, fine-tune and examine a small model on this machine, in minutes."""
    from rich.console import Console

    from openmimo.config.recipe import load_recipe
    from openmimo.config.train import TrainRecipe
    from openmimo.train.loop import train
    from openmimo.train.plots import plot_run

    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    resolved = load_recipe(recipe or RECIPE, [f"seed={seed}", *(overrides or [])], TrainRecipe)
    console.print(
        f"[bold]1. Training[/] {resolved.model.preset} from random weights: {', '.join(DOMAINS)} and source text"
    )
    result = train(resolved, out, resume=resume, overwrite=not resume)
    console.print(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s")
    reports, speed = _examine(console, result, seed=seed, num=num)
    plot = plot_run(out)
    seconds = time.perf_counter() - started
    _write_report(out / "report.json", seconds, result, reports, speed)
    console.print(
        f"\nDone in {seconds / 60:.1f} min. Report in {out / 'report.json'}" + (f", curves in {plot}." if plot else ".")
    )
    console.print(f"Talk to it:  [bold]openmimo chat --model {out}[/]   (it knows problems like those above)")


def _examine(
    console: Console, result: TrainResult, *, seed: int, num: int
) -> tuple[Mapping[str, DomainReport], SpeedReport]:
    """Grade held-out answers, show some, and time decoding with and without drafts."""
    from openmimo.cli.evaluate import reports_table
    from openmimo.engine import Engine
    from openmimo.evals import evaluate_domains
    from openmimo.evals.accuracy import chat_renderer
    from openmimo.evals.speed import measure_draft_speed
    from openmimo.tasks import sample_problem

    # All heads draft in every step, so that the figures below are theirs; by default an engine drafts where it pays.
    heads = result.model.config.num_mtp_heads
    engine = Engine(result.model_dir, max_batch=64, draft_heads=heads)
    console.print(f"\n[bold]2. Examination[/] on {num} problems per domain that were never trained on")
    reports = evaluate_domains(engine, domains=DOMAINS, level=1, num_problems=num, seed=seed)
    for name, report in reports.items():
        sample = report.samples[0]
        console.print(f"\n[dim]{name}, {'right' if sample.score == 1 else 'wrong'}[/]", markup=True)
        console.print(f"{sample.prompt}\n{sample.response}", markup=False)
    console.print()
    console.print(reports_table(reports))
    console.print("\n[bold]3. Drafting[/] three heads draft, the model verifies four tokens at once")
    render = chat_renderer(engine)
    problems = [
        sample_problem(domain, split="test", level=1, seed=seed + 1, index=index)
        for domain in DOMAINS
        for index in range(2)
    ]
    single = Engine(result.model_dir, max_batch=1, draft_heads=heads)
    speed = measure_draft_speed(single, [render(problem.prompt) for problem in problems], max_tokens=96)
    console.print(
        f"one answer at a time: {speed.plain_tokens_per_s:.0f} tokens/s without drafts, "
        f"{speed.draft_tokens_per_s:.0f} with ({speed.speedup:.2f}x); "
        f"{speed.acceptance_length:.2f} of 4 tokens per step; "
        f"output {'identical' if speed.identical else 'NOT identical'}"
    )
    return reports, speed


def _write_report(
    path: Path, seconds: float, result: TrainResult, reports: Mapping[str, DomainReport], speed: SpeedReport
) -> None:
    report: dict[str, Any] = {
        "seconds": seconds,
        "train_seconds": result.seconds,
        "steps": result.steps,
        "tokens": result.tokens,
        "domains": {
            name: {"accuracy": r.accuracy, "constant_baseline": r.constant_baseline, "by_task": dict(r.by_task)}
            for name, r in reports.items()
        },
        "acceptance_length": {name: r.acceptance_length for name, r in reports.items()},
        "draft_speedup": speed.speedup,
        "plain_tokens_per_s": speed.plain_tokens_per_s,
        "draft_tokens_per_s": speed.draft_tokens_per_s,
        "identical_output": speed.identical,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
