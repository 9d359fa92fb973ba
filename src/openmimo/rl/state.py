"""Saving and restoring a post-training run: weights, moments, random state, scheduler, and answers in flight."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from openmimo.checkpoint.training_state import checkpoint_dirs, latest_valid, load_training_state, save_step
from openmimo.errors import CheckpointError
from openmimo.model import MiMoModel
from openmimo.train.device import random_state
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.state import TRAINING_STATE


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands. `tensors` are filled when it is loaded, for `train.state.restore`."""

    step: int
    sampled_tokens: int
    scheduler: Mapping[str, Any]
    rollout: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)


def save_run(
    run_dir: Path,
    state: RunState,
    model: MiMoModel,
    optimizer: MasterAdamW,
    *,
    fingerprint: str,
    write_model: Callable[[Path], object],
    keep: int,
) -> Path:
    """Write one step folder and drop all but the last `keep`."""
    tensors = dict(optimizer.state_tensors())
    tensors |= {f"buffer.{name}": buffer.detach() for name, buffer in model.named_buffers()}
    tensors |= random_state(next(model.parameters()).device)
    meta = {
        "step": state.step,
        "sampled_tokens": state.sampled_tokens,
        "scheduler": dict(state.scheduler),
        "rollout": dict(state.rollout),
        "recipe": fingerprint,
    }
    folder = save_step(run_dir / "checkpoints", state.step, write_model=write_model, tensors=tensors, meta=meta)
    for old in checkpoint_dirs(run_dir / "checkpoints")[:-keep]:
        shutil.rmtree(old)
    return folder


def load_run(run_dir: Path, fingerprint: str) -> RunState:
    """The newest state whose hashes verify.

    Raises: CheckpointError when there is none, or it belongs to another recipe.
    """
    folder = latest_valid(run_dir / "checkpoints")
    tensors, meta = load_training_state(folder / TRAINING_STATE)
    if meta["recipe"] != fingerprint or "scheduler" not in meta:
        raise CheckpointError(
            f"{str(folder)!r} was made with another recipe; use the same recipe and overrides, or another --out folder"
        )
    return RunState(
        step=cast("int", meta["step"]),
        sampled_tokens=cast("int", meta["sampled_tokens"]),
        scheduler=cast("Mapping[str, Any]", meta["scheduler"]),
        rollout=cast("Mapping[str, Any]", meta["rollout"]),
        tensors=tensors,
    )
