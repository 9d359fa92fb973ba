"""`openmimo demo`: from random weights to three teachers, and from them to one student with all their skills."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from openmimo.evals import DomainReport
    from openmimo.evals.speed import SpeedReport
    from openmimo.reproduce.story import Story


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder of the runs; an earlier demo in it is replaced.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of weights, data and problems.")] = 0,
    num: Annotated[int, typer.Option(min=1, help="Held-out problems per domain.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what is finished, go on with what was stopped.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe overrides: base.KEY=, teacher.KEY= or student.KEY=")
    ] = None,
) -> None:
    """Pre-train, fine-tune, make three teachers by reinforcement learning, and one student from them."""
    from rich.console import Console

    from openmimo.cli.train import print_step
    from openmimo.evals.measuring import print_table
    from openmimo.reproduce.story import DOMAINS, Story, load_story
    from openmimo.reproduce.table7 import measure_table7, table7_figures, table7_rows
    from openmimo.train.plots import plot_run

    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    story = Story(
        out,
        load_story(overrides or [], seed=seed),
        say=lambda text: console.print(f"[dim]{time.perf_counter() - started:4.0f} s[/]  {text}"),
        report=print_step(console, every=10),
    )
    if not resume:
        story.forget()
    console.print(f"[bold]1. A base[/] from random weights: {', '.join(DOMAINS)} and source text")
    plot_run(story.base().folder)
    console.print("\n[bold]2. Teachers[/] one per domain, by reinforcement learning on outcome rewards")
    for domain in DOMAINS:
        story.teacher(domain)
    console.print("\n[bold]3. One student[/] from all teachers, on its own answers (MOPD)")
    student = story.student(seed)
    console.print(f"\n[bold]4. Examination[/] on {num} problems per domain that were never trained on")
    table = measure_table7(story, seeds=[seed], num_problems=num, baselines=False)
    model = out / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(student.model, model)
    reports, speed = _show_answers(console, model, DOMAINS, seed=seed, num=num)
    print_table(*table7_rows(table))
    picture = _draw(story, seed, out)
    console.print("\n[bold]5. Drafting[/] three heads draft, the model verifies four tokens at once")
    console.print(
        f"one answer at a time: {speed.plain_tokens_per_s:.0f} tokens/s without drafts, "
        f"{speed.draft_tokens_per_s:.0f} with ({speed.speedup:.2f}x); "
        f"{speed.acceptance_length:.2f} of 4 tokens per step; "
        f"output {'identical' if speed.identical else 'NOT identical'}"
    )
    seconds = time.perf_counter() - started
    _write_report(out / "report.json", seconds, table7_figures(table), reports, speed)
    console.print(
        f"\nDone in {seconds / 60:.1f} min. Report in {out / 'report.json'}"
        + (f", the student's way in {picture}." if picture else ".")
    )
    console.print(f"Talk to it:  [bold]openmimo serve --model {out}[/]   (a page on http://localhost:8000)")
    console.print(f"         or  [bold]openmimo chat --model {out}[/]   (it knows problems like those above)")


def _draw(story: Story, seed: int, out: Path) -> Path | None:
    """The student's scores by step, and its teachers'; None without matplotlib."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return None
    from openmimo.reproduce.plots import plot_student
    from openmimo.reproduce.story import DOMAINS

    teachers = {domain: story.teacher(domain).curve[-1].scores[domain] for domain in DOMAINS}
    plot_student(story.student(seed).curve, teachers, out / "student.png")
    return out / "student.png"


def _show_answers(
    console: Console, model: Path, domains: tuple[str, ...], *, seed: int, num: int
) -> tuple[Mapping[str, DomainReport], SpeedReport]:
    """The student's answers to a problem of each domain, and its speed with and without drafts."""
    from openmimo.engine import Engine
    from openmimo.evals import evaluate_domains
    from openmimo.evals.accuracy import chat_renderer
    from openmimo.evals.speed import measure_draft_speed
    from openmimo.tasks import sample_problem

    # All heads draft in every step, so that the figures are theirs; by default an engine drafts where it pays.
    engine = Engine(model, max_batch=64)
    heads = engine.config.num_mtp_heads
    reports = evaluate_domains(engine.with_drafts(heads), domains=domains, level=1, num_problems=num, seed=seed)
    for name, report in reports.items():
        sample = report.samples[0]
        console.print(f"\n[dim]{name}, {'right' if sample.score == 1 else 'wrong'}[/]", markup=True)
        console.print(f"{sample.prompt}\n{sample.response}", markup=False)
    console.print()
    render = chat_renderer(engine)
    problems = [
        sample_problem(domain, split="test", level=1, seed=seed + 1, index=index)
        for domain in domains
        for index in range(2)
    ]
    single = Engine(model, max_batch=1, draft_heads=heads)
    return reports, measure_draft_speed(single, [render(problem.prompt) for problem in problems], max_tokens=96)


def _write_report(
    path: Path, seconds: float, table: Mapping[str, Any], reports: Mapping[str, DomainReport], speed: SpeedReport
) -> None:
    from dataclasses import asdict

    from openmimo.evals.measuring import describe_machine

    report: dict[str, Any] = {
        "machine": asdict(describe_machine()),
        "seconds": seconds,
        **table,
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
