"""Checkpoint folders: Hub names, FP8 blocks, verified loading, atomic saving, training state."""

from openmimo.checkpoint.convert import convert
from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.save import save_model
from openmimo.checkpoint.training_state import (
    checkpoint_dirs,
    latest_valid,
    load_training_state,
    save_step,
    save_training_state,
)

__all__ = [
    "checkpoint_dirs",
    "convert",
    "latest_valid",
    "load_model",
    "load_training_state",
    "save_model",
    "save_step",
    "save_training_state",
]
