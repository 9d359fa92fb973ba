"""Saving and restoring a run so that it continues bit for bit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from openmimo.checkpoint.training_state import (
    checkpoint_dirs,
    latest_valid,
    load_training_meta,
    load_training_state,
    save_step,
)
from openmimo.errors import CheckpointError
from openmimo.model import MiMoModel
from openmimo.parallel.parts import PARTS, like, local, part_of
from openmimo.train.device import random_state, set_random_state
from openmimo.train.optimizer import MasterAdamW

if TYPE_CHECKING:
    from openmimo.parallel.ranks import Ranks

TRAINING_STATE = "training_state"
# Names of masters and moments, which are divided as their parameters are.
_PARAMETER_STATE = re.compile(r"(?:master|adamw\.exp_avg|adamw\.exp_avg_sq)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: finished steps in all and in the current stage, targets seen, the data cursor.

    `recent_loss` is the moving average of a stage that ends by it.
    """

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    tokens: int = 0
    cursor: Mapping[str, Any] | None = None
    recent_loss: float | None = None


def save_progress(
    run_dir: Path,
    progress: Progress,
    model: MiMoModel,
    optimizer: MasterAdamW,
    *,
    fingerprint: str,
    write_model: Callable[[Path], object],
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write one step folder and drop all but the last `keep`."""
    meta = {
        "step": progress.step,
        "stage": progress.stage,
        "step_in_stage": progress.step_in_stage,
        "tokens": progress.tokens,
        "cursor": None if progress.cursor is None else dict(progress.cursor),
        "recent_loss": progress.recent_loss,
        "num_mtp_heads": model.config.num_mtp_heads,
        "recipe": fingerprint,
    }
    return save_state(
        run_dir, progress.step, model, optimizer, meta=meta, write_model=write_model, keep=keep, ranks=ranks
    )


def save_state(
    run_dir: Path,
    step: int,
    model: MiMoModel,
    optimizer: MasterAdamW,
    *,
    meta: Mapping[str, object],
    write_model: Callable[[Path], object],
    keep: int,
    ranks: Ranks | None = None,
) -> Path:
    """Write a step folder: weights for anyone, and for `restore` moments, buffers, random state and `meta`.

    All but the last `keep` are dropped. `meta` has the fingerprint of the recipe under `recipe`. With `ranks` each
    writes its part, and `write_model` is called on all of them.
    """
    tensors = dict(optimizer.state_tensors())
    tensors |= {f"buffer.{name}": buffer.detach() for name, buffer in model.named_buffers()}
    tensors |= random_state(next(model.parameters()).device)
    if ranks is not None:
        from openmimo.parallel.state import save_parts

        folder = save_parts(
            run_dir / "checkpoints", step, write_model=write_model, tensors=tensors, meta=meta, ranks=ranks
        )
        if not ranks.is_first:
            return folder
    else:
        folder = save_step(run_dir / "checkpoints", step, write_model=write_model, tensors=tensors, meta=meta)
    for old in checkpoint_dirs(run_dir / "checkpoints")[:-keep]:
        shutil.rmtree(old)
    return folder


def load_state(run_dir: Path, fingerprint: str, *, kind: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and meta of the newest state whose hashes verify; `kind` is a key that meta must have.

    Raises: CheckpointError when there is none, or it belongs to another recipe.
    """
    folder, meta = _newest(run_dir, fingerprint, kind)
    return load_training_state(folder / TRAINING_STATE)[0], meta


def load_progress(run_dir: Path, fingerprint: str, ranks: Ranks | None = None) -> tuple[Progress, Path, int]:
    """The newest state whose hashes verify: progress, its folder for `restore_from`, number of MTP heads.

    Raises: CheckpointError when there is none, or it belongs to another recipe; on all ranks.
    """
    if ranks is None:
        folder, meta = _newest(run_dir, fingerprint, "cursor")
    else:
        folder, meta = ranks.by_first(lambda: _newest(run_dir, fingerprint, "cursor"))
    cursor, recent_loss = meta["cursor"], meta.get("recent_loss")
    progress = Progress(
        step=_int(meta, "step"),
        stage=_int(meta, "stage"),
        step_in_stage=_int(meta, "step_in_stage"),
        tokens=_int(meta, "tokens"),
        cursor=cursor if isinstance(cursor, dict) else None,
        recent_loss=recent_loss if isinstance(recent_loss, float) else None,
    )
    return progress, folder, _int(meta, "num_mtp_heads")


def restore_from(folder: Path, model: MiMoModel, optimizer: MasterAdamW, ranks: Ranks | None = None) -> None:
    """`restore` from a step folder that any number of ranks wrote. Raises: CheckpointError."""
    parameters = dict(model.named_parameters())

    def owner(name: str) -> Tensor | None:
        """The parameter that a tensor of the state is divided like."""
        found = _PARAMETER_STATE.fullmatch(name)
        return parameters.get(found[1]) if found else None

    state = folder / TRAINING_STATE
    if any(state.glob(PARTS)):
        from openmimo.parallel.state import read_parts

        def allocate(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
            parameter = owner(name)
            if parameter is None or ranks is None:
                return torch.empty(size, dtype=dtype)
            return like(torch.empty_like(local(parameter), dtype=dtype), parameter)

        tensors = read_parts(state, allocate, ranks)
    else:
        whole, _ = load_training_state(state)
        tensors = {name: part_of(tensor, owner(name)) for name, tensor in whole.items()}
    restore(model, optimizer, tensors)


def _newest(run_dir: Path, fingerprint: str, kind: str) -> tuple[Path, dict[str, object]]:
    folder = latest_valid(run_dir / "checkpoints")
    meta = load_training_meta(folder / TRAINING_STATE)
    if meta["recipe"] != fingerprint or kind not in meta:
        raise CheckpointError(
            f"{str(folder)!r} was made with another recipe; use the same recipe and overrides, or another --out folder"
        )
    return folder, meta


@torch.no_grad()
def restore(model: MiMoModel, optimizer: MasterAdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put weights, moments, buffers and the random state back."""
    optimizer.load_state_tensors(dict(tensors))
    for name, buffer in model.named_buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
    set_random_state(dict(tensors), next(model.parameters()).device)


def _int(meta: Mapping[str, object], key: str) -> int:
    value = meta[key]
    if not isinstance(value, int):
        raise CheckpointError(f"training state has {key}={value!r}; expected a whole number")
    return value
