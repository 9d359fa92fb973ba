"""The folder of a run: made for a new one, tidied for one that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from openmimo.checkpoint.training_state import checkpoint_dirs
from openmimo.errors import TrainingError


def make_folder(run_dir: Path, overwrite: bool) -> None:
    """An empty place for a new run: checkpoints of an earlier one would outlive and shadow its own.

    Raises: TrainingError when there are some and `overwrite` is false, or the folder cannot be written.
    """
    earlier = checkpoint_dirs(run_dir / "checkpoints")
    if earlier and not overwrite:
        raise TrainingError(
            f"{str(run_dir)!r} holds a run up to {earlier[-1].name}; go on with --resume, replace it with --overwrite, "
            "or choose another --out folder"
        )
    try:
        for folder in earlier:
            shutil.rmtree(folder)
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write into {str(run_dir)!r}: {error}; choose another --out folder") from error


def forget_later_metrics(path: Path, step: int) -> None:
    """Drop the lines of steps that a killed run made after its last checkpoint; they come again."""
    lines = path.read_text().splitlines() if path.is_file() else []
    kept: list[str] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the line that was being written
            continue
        if record["step"] <= step:
            kept.append(line)
    path.write_text("".join(f"{line}\n" for line in kept))
