"""`openmimo train {pretrain,sft,rl,mopd}`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

train_app = typer.Typer(help="Train from a TOML recipe; every field can be overridden as a dotted key=value.")

Recipe = Annotated[Path, typer.Argument(help="TOML recipe, such as recipes/demo.toml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as optimizer.peak_lr=1e-3")]
Out = Annotated[Path | None, typer.Option(help="Run folder (default: runs/NAME)")]
Resume = Annotated[bool, typer.Option(help="Go on from the newest intact checkpoint of the run folder")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the checkpoints of an earlier run in the folder")]
PrintConfig = Annotated[bool, typer.Option(help="Print the resolved recipe and stop")]


@train_app.command("pretrain")
def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
) -> None:
    """Pre-train (and, where the recipe has such stages, go on to fine-tune)."""
    _run(recipe, overrides or [], out, print_config, only=None, resume=resume, overwrite=overwrite)


@train_app.command("sft")
def sft(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
) -> None:
    """Fine-tune: a recipe whose stages are all of kind sft."""
    _run(recipe, overrides or [], out, print_config, only="sft", resume=resume, overwrite=overwrite)


@train_app.command("rl")
def rl(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
) -> None:
    """Reinforcement learning from outcome rewards (GRPO)."""
    _run_policy(recipe, overrides or [], out, print_config, algorithm="grpo", resume=resume, overwrite=overwrite)


@train_app.command("mopd")
def mopd(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    print_config: PrintConfig = False,
) -> None:
    """Distill several domain teachers into one student on its own answers (MOPD)."""
    _run_policy(recipe, overrides or [], out, print_config, algorithm="mopd", resume=resume, overwrite=overwrite)


def step_line(record: dict[str, Any]) -> str:
    """A step's figures in one line."""
    rewards = " ".join(f"{domain} {value:.0%}" for domain, value in record["rewards"].items())
    parts = [f"step {record['step']}, {min(1.0, record['progress']):.0%}", f"reward {rewards}"]
    if record["divergence"]:
        gaps = "/".join(f"{value:.3f}" for value in record["divergence"].values())
        parts.append(f"to teachers {gaps} nats")
    if record["num_updates"]:
        parts.append(f"sampler KL {record['mismatch']['kl']:.1e}")
        parts.append(f"entropy {record['entropy']:.2f}")
    parts.append(f"{record['acceptance_length']:.2f} tokens per step")
    parts.append(f"{record['seconds']['all']:.1f} s")
    if record["num_zeros_alert"]:
        parts.append(f"num-zeros {record['num_zeros_alert']}")
    return "  ".join(parts)


def print_step(console: Console, *, every: int = 1) -> Callable[[dict[str, Any]], None]:
    """A callback that prints the line of every so many steps, and of the first and last."""

    def report(record: dict[str, Any]) -> None:
        if record["step"] % every == 0 or record["step"] == 1 or record["progress"] >= 1.0:
            console.print(step_line(record), highlight=False, soft_wrap=True)

    return report


def _run_policy(
    recipe_path: Path,
    overrides: list[str],
    out: Path | None,
    print_config: bool,
    *,
    algorithm: str,
    resume: bool,
    overwrite: bool,
) -> None:
    from rich.console import Console

    from openmimo.config.recipe import load_recipe, to_toml
    from openmimo.config.rl import RLRecipe
    from openmimo.errors import ConfigError

    recipe = load_recipe(recipe_path, overrides, RLRecipe)
    if print_config:
        typer.echo(to_toml(recipe))
        return
    if recipe.algorithm.value != algorithm:
        raise ConfigError(
            f"the recipe's algorithm is {recipe.algorithm.value!r}, expected {algorithm!r}; "
            "use `openmimo train rl` for grpo and `openmimo train mopd` for mopd"
        )

    from openmimo.rl.loop import PolicyRun

    run = PolicyRun(
        recipe,
        out or Path("runs") / recipe.name,
        resume=resume,
        overwrite=overwrite,
        report=print_step(Console()),
    )
    result = run.finish()
    typer.echo(
        f"{result.steps} steps, {result.sampled_tokens:,} tokens sampled in {result.seconds:.0f} s; "
        f"model in {result.model_dir}"
    )


def _run(
    recipe_path: Path,
    overrides: list[str],
    out: Path | None,
    print_config: bool,
    *,
    only: str | None,
    resume: bool,
    overwrite: bool,
) -> None:
    from openmimo.config.recipe import load_recipe, to_toml
    from openmimo.config.train import TrainRecipe
    from openmimo.errors import ConfigError

    recipe = load_recipe(recipe_path, overrides, TrainRecipe)
    if print_config:
        typer.echo(to_toml(recipe))
        return
    wrong = [stage.name for stage in recipe.stages if only and stage.kind.value != only]
    if wrong:
        raise ConfigError(
            f"stages {wrong} are not of kind {only!r}; use `openmimo train pretrain` or change their kind"
        )

    from openmimo.train.loop import train
    from openmimo.train.plots import plot_run

    result = train(recipe, out or Path("runs") / recipe.name, resume=resume, overwrite=overwrite)
    if not result.is_first:
        return
    plot = plot_run(result.model_dir.parent)
    typer.echo(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s; model in {result.model_dir}")
    typer.echo(f"curves in {plot}" if plot else 'no curves: matplotlib is missing; pip install "openmimo[plots]"')
