"""One run of `openmimo bench`: prepare the models, open the targets, measure, print."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from openmimo.config.io import read_model_config
from openmimo.config.model import ModelConfig, preset_names
from openmimo.errors import RequestError, nearest
from openmimo.evals.bench import (
    BenchRow,
    bench_decode,
    bench_load,
    bench_mtp,
    bench_prefill,
    open_targets,
    random_tokens,
)
from openmimo.evals.bench_limits import Limits
from openmimo.evals.bench_models import domain_prompts, prepare_models
from openmimo.evals.bench_target import TARGET_KINDS, TargetKind, TargetSpec, Weights
from openmimo.evals.measuring import describe_machine, print_result, print_table

Work = Literal["prefill", "decode", "batch", "context", "mtp", "load"]
PROMPT_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure. `batches` and `contexts` (prompt lengths for prefill) span a grid.

    `model` is a preset with random weights or a folder; `runner` "none" leaves this package out. `domains` give the
    prompts of `mtp`; a model without a tokenizer gets random ones. Files are kept in `work_dir` if it is given.
    """

    work: Work
    model: str
    against: tuple[str, ...] = ()
    runner: str = "auto"
    weights: Weights = "bf16"
    activations: str = "auto"
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128,)
    num_tokens: int = 32
    num_drafts: int = 3
    domains: tuple[str, ...] = ("math",)
    rounds: int = 5
    threads: int = 1
    work_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in self.against:
            if name not in TARGET_KINDS[1:]:
                raise RequestError(f"no peer {name!r}; {nearest(name, TARGET_KINDS[1:])}")
        if self.runner == "none" and not self.against:
            raise RequestError("runner 'none' and no peers leave nothing to measure; name peers with --against")
        for name, least in (("batches", 1), ("contexts", 1)):
            numbers: tuple[int, ...] = getattr(self, name)
            if not numbers or min(numbers) < least:
                raise RequestError(f"{name}={numbers} must be whole numbers of at least {least}")

    @property
    def kinds(self) -> list[TargetKind]:
        wanted = (*(() if self.runner == "none" else ("openmimo",)), *self.against)
        return [kind for kind in TARGET_KINDS if kind in wanted]


def run_bench(plan: BenchPlan) -> list[BenchRow]:
    """Measure. Raises: MimoError.   Cost: minutes; with a preset the disk space of the model in each form."""
    torch.set_num_threads(plan.threads)
    place: AbstractContextManager[str | Path] = (
        nullcontext(plan.work_dir) if plan.work_dir else tempfile.TemporaryDirectory()
    )
    with place as folder:
        paths = prepare_models(plan.model, plan.weights, plan.kinds, Path(folder))
        config = read_model_config(paths["openmimo"])
        specs = [
            TargetSpec(
                kind=kind,
                path=paths[kind],
                weights=plan.weights,
                activations=plan.activations,
                threads=plan.threads,
                runner=plan.runner,
                with_mtp=plan.work == "mtp",
            )
            for kind in plan.kinds
        ]
        return _measure(plan, specs, config, paths["openmimo"])


def print_rows(plan: BenchPlan, rows: Sequence[BenchRow]) -> None:
    """A table with shares of the limit and ratios to this package, then one JSON line.

    Ratios are medians over the rounds, each target beside this package in the same round.
    """
    ours = {row.work: row.seconds for row in rows if row.target == "openmimo"}
    table: list[list[object]] = []
    for row in rows:
        limit = row.limit_tokens_per_s
        rate: object = row.tokens_per_s if plan.work != "load" else f"{1 / row.tokens_per_s:.3g} s"
        table.append(
            [
                row.work,
                row.target,
                rate,
                f"{100 * row.spread:.0f}%",
                "-" if limit is None else limit,
                "-" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f}%",
                f"x{_median_ratio(row.seconds, ours[row.work]):.2f}" if row.work in ours else "-",
                ", ".join([*filter(None, [row.settings]), *(f"{k} {v:.4g}" for k, v in row.details.items())]),
            ]
        )
    rate_title = "load" if plan.work == "load" else "tokens/s"
    print_table(("work", "target", rate_title, "spread", "limit", "share", "openmimo/it", "settings"), table)
    about = {
        "model": plan.model,
        "weights": plan.weights,
        "activations": plan.activations,
        "threads": plan.threads,
    }
    print_result(f"bench {plan.work}", describe_machine(), {**about, "rows": [row.as_json() for row in rows]})


def _median_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    return median(mine / other for mine, other in zip(seconds, others, strict=True))


def _measure(plan: BenchPlan, specs: Sequence[TargetSpec], config: ModelConfig, folder: Path) -> list[BenchRow]:
    if plan.work == "load":
        return bench_load(specs, config, rounds=plan.rounds)
    limits = Limits.measure(config, plan.weights)
    with open_targets(specs) as targets:
        if plan.work == "prefill":
            return bench_prefill(targets, config, limits, lengths=plan.contexts, rounds=plan.rounds)
        if plan.work == "mtp":
            return bench_mtp(
                targets,
                _prompts(plan, config, folder),
                batches=plan.batches,
                num_tokens=plan.num_tokens,
                num_drafts=plan.num_drafts,
                rounds=plan.rounds,
            )
        return bench_decode(
            targets,
            config,
            limits,
            batches=plan.batches,
            contexts=plan.contexts,
            num_steps=plan.num_tokens,
            rounds=plan.rounds,
        )


def _prompts(plan: BenchPlan, config: ModelConfig, folder: Path) -> dict[str, list[list[int]]]:
    num_prompts = max(plan.batches)
    if plan.model in preset_names() or not (folder / "tokenizer.json").is_file():
        return {"random": random_tokens(random.Random(0), config.vocab_size, num_prompts, PROMPT_TOKENS)}
    return domain_prompts(folder, plan.domains, num_prompts)
