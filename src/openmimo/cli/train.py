"""`openmimo train {pretrain,sft}`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    plot = plot_run(result.model_dir.parent)
    typer.echo(f"{result.steps} steps, {result.tokens:,} tokens in {result.seconds:.0f} s; model in {result.model_dir}")
    typer.echo(f"curves in {plot}" if plot else 'no curves: matplotlib is missing; pip install "openmimo[plots]"')
