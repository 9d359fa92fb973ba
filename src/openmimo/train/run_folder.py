"""The folder of a run: made for a new one, tidied for one that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from openmimo.checkpoint.training_state import checkpoint_dirs
from openmimo.config.recipe import to_toml
from openmimo.errors import TrainingError
from openmimo.model import MiMoModel
from openmimo.train.monitors import git_revision


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


def write_start(run_dir: Path, recipe: object, model: MiMoModel) -> None:
    """What a new run is made from: recipe.toml, and run.json with the code, the machine's part and the model's size."""
    (run_dir / "metrics.jsonl").unlink(missing_ok=True)
    (run_dir / "recipe.toml").write_text(to_toml(recipe))
    weight = model.lm_head.weight
    facts = {
        "git_revision": git_revision(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": str(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (run_dir / "run.json").write_text(json.dumps(facts, indent=2) + "\n")


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
