"""Saving and restoring a post-training run: weights, moments, random state, scheduler, and answers in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from openmimo.model import MiMoModel
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.state import load_state, save_state


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
    meta = {
        "step": state.step,
        "sampled_tokens": state.sampled_tokens,
        "scheduler": dict(state.scheduler),
        "rollout": dict(state.rollout),
        "recipe": fingerprint,
    }
    return save_state(run_dir, state.step, model, optimizer, meta=meta, write_model=write_model, keep=keep)


def load_run(run_dir: Path, fingerprint: str) -> RunState:
    """The newest state whose hashes verify.

    Raises: CheckpointError when there is none, or it belongs to another recipe.
    """
    tensors, meta = load_state(run_dir, fingerprint, kind="scheduler")
    return RunState(
        step=cast("int", meta["step"]),
        sampled_tokens=cast("int", meta["sampled_tokens"]),
        scheduler=cast("Mapping[str, Any]", meta["scheduler"]),
        rollout=cast("Mapping[str, Any]", meta["rollout"]),
        tensors=tensors,
    )
