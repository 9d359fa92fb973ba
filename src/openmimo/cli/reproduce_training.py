"""`openmimo reproduce`: the figures of post-training, from one folder of runs that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openmimo.cli.bench import parse_numbers, parse_words
from openmimo.cli.reproduce_speed import PlotOption

if TYPE_CHECKING:
    from openmimo.reproduce.story import Story

OutOption = Annotated[Path, typer.Option(help="Folder of the runs; those that are finished are not made again.")]
SeedsOption = Annotated[str, typer.Option(help="Seeds of the students, comma-separated.")]
NumOption = Annotated[int, typer.Option(min=1, help="Held-out problems per domain.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe overrides: base.KEY=, teacher.KEY=, student.KEY= or long.KEY=")
]
RUNS = Path("runs/story")


class SamplerWeights(StrEnum):
    """What a rollout's sampler may compute with."""

    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


def table7_command(
    overrides: Overrides = None,
    out: OutOption = RUNS,
    seeds: SeedsOption = "0,1,2",
    num: NumOption = 1000,
    baselines: Annotated[bool, typer.Option("--baselines/--no-baselines", help="Other students beside MOPD.")] = True,
    plot: PlotOption = True,
) -> None:
    """Table 7: every domain before, with the best teacher and after MOPD; and what other ways to one model give."""
    from openmimo.reproduce import table7

    story = _story(out, overrides, plot)
    table = table7.measure_table7(story, seeds=parse_numbers("--seeds", seeds), num_problems=num, baselines=baselines)
    draw = _plots().plot_table7 if plot else None
    _show("table7", out, table, [table7.table7_rows(table)], table7.table7_figures(table), draw)


def figure6_command(
    overrides: Overrides = None,
    out: OutOption = RUNS,
    seeds: SeedsOption = "0,1,2",
    outcome_steps: Annotated[int, typer.Option(min=1, help="Steps of the arm with outcome rewards alone.")] = 200,
    plot: PlotOption = True,
) -> None:
    """Figure 6: outcome reward alone, MOPD without it, and MOPD: scores over steps."""
    from openmimo.reproduce import figure6

    story = _story(out, overrides, plot)
    figure = figure6.measure_figure6(story, seeds=parse_numbers("--seeds", seeds), outcome_steps=outcome_steps)
    draw = _plots().plot_figure6 if plot else None
    _show("figure6", out, figure, [figure6.figure6_rows(figure)], figure6.figure6_figures(figure), draw)
    if figure.factor is None:
        typer.echo("MOPD did not reach the teachers")
    else:
        typer.echo(
            f"outcome reward alone needs {'more than ' if figure.factor_is_bound else ''}"
            f"{figure.factor:.1f} times the steps of MOPD"
        )


def seesaw_command(
    overrides: Overrides = None,
    out: OutOption = RUNS,
    seed: Annotated[int, typer.Option(help="Seed of the runs.")] = 0,
    plot: PlotOption = True,
) -> None:
    """The see-saw: reinforcement learning in one domain after the other, beside MOPD."""
    from openmimo.reproduce import seesaw

    report = seesaw.measure_seesaw(_story(out, overrides, plot), seed=seed)
    draw = _plots().plot_seesaw if plot else None
    _show("seesaw", out, report, [seesaw.seesaw_rows(report)], seesaw.seesaw_figures(report), draw)


def r3_command(
    overrides: Overrides = None,
    out: OutOption = RUNS,
    domain: Annotated[str, typer.Option(help="Domain to learn.")] = "math",
    precisions: Annotated[
        str, typer.Option(help="Formats of the sampler's weights, comma-separated; exact is the invariant fp32 path.")
    ] = "exact,bf16,int8,fp8,int4",
    seeds: SeedsOption = "0,1,2",
    steps: Annotated[int, typer.Option(min=0, help="Steps of learning; 0 measures the mismatch alone.")] = 60,
    learning_rate: Annotated[float, typer.Option(help="Of the runs that learn.")] = 1e-3,
    minibatches: Annotated[int, typer.Option(min=1, help="Updates per step of the runs that learn.")] = 4,
    weights: Annotated[
        SamplerWeights, typer.Option(help="Of the sampler in the runs that learn.")
    ] = SamplerWeights.INT8,
    plot: PlotOption = True,
) -> None:
    """R3: trainer against sampler with and without replayed experts, and learning with and without them."""
    from openmimo.reproduce import r3

    report = r3.measure_r3(
        _story(out, overrides, plot),
        domain=domain,
        precisions=parse_words(precisions),
        seeds=parse_numbers("--seeds", seeds),
        steps=steps,
        learning_rate=learning_rate,
        minibatches=minibatches,
        weights=weights.value,
    )
    tables = [r3.r3_rows(report), *([r3.learning_rows(report)] if steps else [])]
    draw = _plots().plot_r3 if plot and steps else None
    _show("r3", out, report, tables, r3.r3_figures(report), draw)


def numzeros_command(
    overrides: Overrides = None,
    out: OutOption = RUNS,
    steps: StepsOption = 200,
    conversations: Annotated[int, typer.Option(min=1, help="What over-fitting repeats.")] = 4,
    reverse_rate: Annotated[float, typer.Option(help="How fast balance is undone, per step.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
    plot: PlotOption = True,
) -> None:
    """num-zeros: the count of zero gradients under a forced imbalance of experts and under over-fitting."""
    from openmimo.reproduce import numzeros

    report = numzeros.measure_numzeros(
        _story(out, overrides, plot), steps=steps, conversations=conversations, reverse_rate=reverse_rate, seed=seed
    )
    draw = _plots().plot_numzeros if plot else None
    _show("numzeros", out, report, [numzeros.numzeros_rows(report)], numzeros.numzeros_figures(report), draw)


def attention_command(
    overrides: Overrides = None,
    out: OutOption = RUNS,
    seeds: SeedsOption = "0,1,2",
    windows: Annotated[str, typer.Option(help="Windows to train without and with a sink, comma-separated.")] = "16",
    wide: Annotated[int, typer.Option(min=1, help="A wider window, with a sink.")] = 64,
    num: NumOption = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions of what is timed.")] = 5,
    jobs: Annotated[int, typer.Option(min=0, help="Runs at the same time; 0: two without a GPU, else one.")] = 0,
    plot: PlotOption = True,
) -> None:
    """Tables 2 and 3: global layers only beside sliding windows, without and with a sink.

    The stages have fewer steps than in the recipe; overrides such as `long.stages.2.steps=1000` change that.
    """
    import torch

    from openmimo.cli.machine import usable_cores
    from openmimo.reproduce import attention

    report = attention.measure_attention(
        _story(out, [*attention.HOURLY, *(overrides or ())], plot),
        arms=attention.arms_of(parse_numbers("--windows", windows), wide),
        seeds=parse_numbers("--seeds", seeds),
        num_problems=num,
        rounds=rounds,
        jobs=jobs or (1 if torch.cuda.is_available() or usable_cores() < 2 else 2),
    )
    draw = _plots().plot_attention if plot else None
    tables = [attention.attention_rows(report), attention.cost_rows(report)]
    _show("attention", out, report, tables, attention.attention_figures(report), draw)
    for value, unit in (("loss", "nats per token"), ("domains", "of the problems")):
        for window, difference, error in attention.sink_difference(report, value):
            typer.echo(f"window {window}: the sink changes {difference:+.4f} +-{error:.4f} {unit}")
    hybrid, other = report.flash
    typer.echo(f"MiMo-V2-Flash at 256k tokens: {other / hybrid:.2f} times fewer bytes than with global layers only")


def _story(out: Path, overrides: list[str] | None, plot: bool) -> Story:
    """The folder's story, whose runs say where they are."""
    from rich.console import Console

    from openmimo.cli.train import print_step
    from openmimo.reproduce.plots import demand_matplotlib
    from openmimo.reproduce.story import Story, load_story

    if plot:
        demand_matplotlib()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return Story(
        out,
        load_story(overrides or []),
        say=console.print,
        report=print_step(console, every=10),
    )


def _plots() -> Any:
    from openmimo.reproduce import plots

    return plots


def _show(
    name: str,
    out: Path,
    report: Any,
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    figures: Mapping[str, Any],
    draw: Callable[[Any, Path], None] | None,
) -> None:
    """Tables and one JSON line on the screen; the same JSON, and the picture, as files."""
    import json
    from dataclasses import asdict

    from openmimo.evals.measuring import describe_machine, print_table

    for header, rows in tables:
        print_table(header, rows)
        typer.echo("")
    line = json.dumps({"reproduce": name, "machine": asdict(describe_machine()), **figures})
    typer.echo(line)
    (out / f"{name}.json").write_text(line + "\n", encoding="utf-8")
    if draw is not None:
        draw(report, out / f"{name}.png")
    typer.echo(f"written into {out}")


COMMANDS = {
    "table7": table7_command,
    "figure6": figure6_command,
    "seesaw": seesaw_command,
    "r3": r3_command,
    "numzeros": numzeros_command,
    "attention": attention_command,
}
