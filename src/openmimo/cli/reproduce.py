"""`openmimo reproduce`: tables and figures of the MiMo-V2-Flash report, measured again in small."""

from __future__ import annotations

import typer

from openmimo.cli import reproduce_speed, reproduce_training

reproduce_app = typer.Typer(no_args_is_help=True, help="Measure figures of the MiMo-V2-Flash report again, in small.")
for _name, _command in {**reproduce_training.COMMANDS, **reproduce_speed.COMMANDS}.items():
    reproduce_app.command(_name)(_command)
