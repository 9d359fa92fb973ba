"""The `openmimo` command: one verb per file, heavy imports inside the verbs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Annotated

import typer
from typer.core import TyperGroup

import openmimo
from openmimo.errors import MimoError

# Verb -> module and attribute, in the order of the help text. A `typer.Typer` becomes a group, a function a command.
VERBS: Mapping[str, tuple[str, str]] = {
    "demo": ("openmimo.cli.demo", "demo_command"),
    "train": ("openmimo.cli.train", "train_app"),
    "generate": ("openmimo.cli.generate", "generate_command"),
    "chat": ("openmimo.cli.chat", "chat_command"),
    "serve": ("openmimo.cli.serve", "serve_command"),
    "eval": ("openmimo.cli.evaluate", "eval_command"),
    "convert": ("openmimo.cli.convert", "convert_command"),
    "bench": ("openmimo.cli.bench", "bench_command"),
    "reproduce": ("openmimo.cli.reproduce", "reproduce_app"),
    "plan": ("openmimo.cli.plan", "plan_command"),
    "doctor": ("openmimo.cli.doctor", "doctor_command"),
}


class VerbGroup(TyperGroup):
    """Lists the verbs in the order of the table; by itself Typer puts groups behind commands."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(VERBS)


def build_app() -> typer.Typer:
    """The command with all its verbs."""
    app = typer.Typer(cls=VerbGroup, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_options)
    for verb, (module, attribute) in VERBS.items():
        found = getattr(importlib.import_module(module), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=verb)
        else:
            app.command(verb)(found)
    return app


def main() -> None:
    """Run the command. Errors that a user can cause end in one line and status 2, Ctrl-C in status 130."""
    try:
        build_app()(prog_name="openmimo")
    except MimoError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(openmimo.__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """MiMo-V2-Flash on your own machine: train, decode with MTP drafts, examine, convert."""
