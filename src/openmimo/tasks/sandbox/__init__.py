"""Running untrusted Python programs: a process of its own, locked in as far as the system allows, which is reported."""

from openmimo.tasks.sandbox.level import Layer, Level, available_level
from openmimo.tasks.sandbox.run import Limits, ProgramResult, Status, run_program

__all__ = ["Layer", "Level", "Limits", "ProgramResult", "Status", "available_level", "run_program"]
