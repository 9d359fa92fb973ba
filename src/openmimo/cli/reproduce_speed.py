"""`openmimo reproduce`: the report's figures about drafting, on a model of one's own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from openmimo.cli.bench import WeightsChoice, parse_numbers, parse_words
from openmimo.cli.machine import usable_cores
from openmimo.errors import RequestError

ModelOption = Annotated[Path, typer.Option(help="Checkpoint folder, or a run folder that holds one in model/.")]
DomainsOption = Annotated[str, typer.Option(help="Comma-separated domains.")]
RunnerOption = Annotated[str, typer.Option(help="What computes: auto, native (C++) or torch.")]
WeightsOption = Annotated[WeightsChoice, typer.Option(help="Number format of the weights.")]
PlotOption = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the picture (extra plots).")]


def figure7_command(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder for figure7.json and figure7.png.")] = Path("runs/figure7"),
    domains: DomainsOption = "math,code,logic",
    levels: Annotated[str, typer.Option(help="Difficulties of the problems, comma-separated.")] = "1,2,3",
    temperatures: Annotated[str, typer.Option(help="Above 0, comma-separated.")] = "0.5,1,1.5",
    num: Annotated[int, typer.Option(min=1, help="Prompts per dataset.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens per answer.")] = 128,
    seed: Annotated[int, typer.Option(help="Chooses problems and draws.")] = 0,
    weights: WeightsOption = WeightsChoice.BF16,
    runner: RunnerOption = "auto",
    plot: PlotOption = True,
) -> None:
    """Figure 7: acceptance length against next-token cross-entropy by dataset, with the fitted curve and its R2."""
    from openmimo.engine import Engine
    from openmimo.reproduce import figure7
    from openmimo.reproduce.plots import demand_matplotlib, plot_figure7

    if plot:
        demand_matplotlib()
    engine = Engine(model, runner=runner, weights=weights.value)
    datasets = figure7.figure_datasets(
        engine,
        domains=parse_words(domains),
        levels=parse_numbers("--levels", levels),
        temperatures=_decimals("--temperatures", temperatures),
        num_prompts=num,
        seed=seed,
    )
    figure = figure7.measure_figure7(engine, datasets, max_tokens=max_tokens, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    about = {"model": str(model), "weights": weights.value, "prompts": num, "max_tokens": max_tokens, "seed": seed}
    figure7.print_figure7(figure)
    figure7.write_figure7(figure, out / "figure7.json", about)
    if plot:
        plot_figure7(figure, out / "figure7.png")
    typer.echo(f"written into {out}")


def table10_command(
    model: ModelOption,
    out: Annotated[Path, typer.Option(help="Folder for table10.json and table10.png.")] = Path("runs/table10"),
    batches: Annotated[str, typer.Option(help="Answers at the same time, comma-separated.")] = "1,2,4,8,16,32",
    acceptance: Annotated[
        str, typer.Option(help="Tokens per step to set, comma-separated.")
    ] = "2.8,3.0,3.2,3.4,3.6,3.8",
    domains: DomainsOption = "math,code,logic",
    tokens: Annotated[
        int, typer.Option(min=8, help="Tokens per answer; beyond its end an answer is foretold worse.")
    ] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in turns; the medians count.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="0: all usable cores.")] = 0,
    weights: WeightsOption = WeightsChoice.BF16,
    runner: RunnerOption = "auto",
    plot: PlotOption = True,
) -> None:
    """Table 10: decoding speed with drafts over that without, by batch and acceptance length."""
    from openmimo.engine import resolve_model_folder
    from openmimo.evals.bench_models import domain_prompts
    from openmimo.evals.measuring import describe_machine
    from openmimo.reproduce import table10
    from openmimo.reproduce.plots import demand_matplotlib, plot_table10

    if plot:
        demand_matplotlib()
    sizes = parse_numbers("--batches", batches)
    prompts = domain_prompts(resolve_model_folder(model), parse_words(domains), max(sizes))
    threads = threads or usable_cores()
    clock = table10.DecodeClock(
        model, prompts, runner=runner, weights=weights.value, threads=threads, num_tokens=tokens
    )
    lengths = _decimals("--acceptance", acceptance)
    cells = table10.measure_table10(clock, prompts, batches=sizes, acceptance_lengths=lengths, rounds=rounds)
    out.mkdir(parents=True, exist_ok=True)
    about = {"model": str(model), "weights": weights.value, "threads": threads, "tokens": tokens, "rounds": rounds}
    table10.print_table10(cells)
    table10.write_table10(cells, out / "table10.json", {**about, "machine": asdict(describe_machine())})
    if plot:
        plot_table10(cells, out / "table10.png")
    typer.echo(f"written into {out}")


def _decimals(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, parse_words(text)))
    except ValueError:
        numbers = ()
    if not numbers:
        raise RequestError(f"{option} {text!r} must be numbers with commas between them, such as 0.5,1")
    return numbers


COMMANDS = {"figure7": figure7_command, "table10": table10_command}
