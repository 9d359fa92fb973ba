"""`openmimo bench`: speed of this package's engine and of its peers, in turns, beside what the hardware allows."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from openmimo.cli.machine import usable_cores
from openmimo.errors import RequestError


class What(str, Enum):
    """The work that is measured."""

    PREFILL = "prefill"
    DECODE = "decode"
    BATCH = "batch"
    CONTEXT = "context"
    MTP = "mtp"
    LOAD = "load"


class WeightsChoice(str, Enum):
    """Number format of the weights, the same for all."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    INT8 = "int8"


# Batches and contexts (for prefill: prompt lengths) unless the options say otherwise.
_BATCHES = {What.BATCH: "8,32", What.MTP: "1,8,32"}
_CONTEXTS = {What.PREFILL: "512,4096", What.CONTEXT: "1024,4096,16384,32768"}


def bench_command(
    what: Annotated[
        What,
        typer.Argument(
            help="prefill: one prompt; decode: one sequence; batch: several; context: long ones; "
            "mtp: with and without drafts; load: files to first token."
        ),
    ],
    model: Annotated[str, typer.Option(help="A preset (random weights), or a checkpoint or run folder.")] = "tiny",
    against: Annotated[str, typer.Option(help="Peers, comma-separated: transformers, llama.cpp.")] = "",
    runner: Annotated[str, typer.Option(help="This package's: auto, native, torch or none.")] = "auto",
    weights: Annotated[WeightsChoice, typer.Option(help="Number format of the weights.")] = WeightsChoice.BF16,
    activations: Annotated[str, typer.Option(help="This package's: int8 with int8 weights; or auto.")] = "auto",
    batches: Annotated[str | None, typer.Option(help="Numbers of sequences, comma-separated.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens before decoding starts; prompt lengths.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per sequence and round.")] = 32,
    drafts: Annotated[int, typer.Option(min=0, help="MTP heads that draft, for mtp.")] = 3,
    domains: Annotated[str, typer.Option(help="Domains of the prompts of mtp; random ones for a preset.")] = "math",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in turns; the medians count.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads of every engine; 0: all usable cores.")] = 0,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where converted models are kept for the next time; else they are deleted.")
    ] = None,
) -> None:
    """Measure speed: engines in turns (A B A B), median and spread, the physical limit; a table, then a JSON line."""
    from openmimo.evals.bench_run import BenchPlan, print_rows, run_bench

    plan = BenchPlan(
        work=what.value,
        model=model,
        against=parse_words(against),
        runner=runner,
        weights=weights.value,
        activations=activations,
        batches=parse_numbers("--batches", batches or _BATCHES.get(what, "1")),
        contexts=parse_numbers("--contexts", contexts or _CONTEXTS.get(what, "128")),
        num_tokens=tokens,
        num_drafts=drafts,
        domains=parse_words(domains),
        rounds=rounds,
        threads=threads or usable_cores(),
        work_dir=work_dir,
    )
    print_rows(plan, run_bench(plan))


def parse_words(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them. Raises: RequestError that names the option."""
    words = parse_words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise RequestError(f"{option} {text!r} must be whole numbers with commas between them, such as 8,32")
    return tuple(map(int, words))
