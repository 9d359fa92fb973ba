"""Training state in a folder: tensors, metadata and a manifest that is checked on every load.

A run keeps its checkpoints in folders `step-00000100`. Each holds the weights and a `training_state/`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from openmimo.checkpoint.files import atomic_folder, recover_folder, remove_leftovers
from openmimo.checkpoint.manifest import folder_writer, verify_manifest
from openmimo.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from openmimo.config.strict_json import read_json_object
from openmimo.errors import CheckpointError

TRAINING_STATE_NAME = "training_state"
TENSORS_NAME = "tensors.safetensors"
META_NAME = "meta.json"
_MAX_META_BYTES = 256_000_000
_STEP_NAME = re.compile(r"step-([0-9]{8,})")

_log = logging.getLogger(__name__)


def save_training_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata as one folder that appears whole or not at all.

    Raises: CheckpointError when metadata is not JSON or the folder cannot be written.
    """
    try:
        text = json.dumps(dict(meta), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"training metadata must be plain JSON: {error}; convert the value") from error
    with folder_writer(folder) as writer:
        with writer.create(TENSORS_NAME) as file:
            write_safetensors(file, tensors)
        writer.add_bytes(META_NAME, text.encode())


def load_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The tensors and metadata of `save_training_state`, after checking every hash.

    Raises: CheckpointError when the folder is missing, incomplete or differs from its manifest.
    """
    recover_folder(folder)
    records = verify_manifest(folder)
    if set(records) != {TENSORS_NAME, META_NAME}:
        raise CheckpointError(f"{str(folder)!r} lists {sorted(records)}, not a training state; use another folder")
    with SafetensorsFile(folder / TENSORS_NAME) as file:
        tensors = {name: file.read(name) for name in file.entries}
    return tensors, load_training_meta(folder)


def load_training_meta(folder: Path) -> dict[str, object]:
    """The metadata alone, unverified. Raises: CheckpointError."""
    return read_json_object(folder / META_NAME, max_bytes=_MAX_META_BYTES)


def save_step(
    run_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, object],
) -> Path:
    """Write `run_dir/step-...` with weights and training state in one atomic move; returns its path.

    `write_model` gets the folder to save the weights to. Raises: CheckpointError.
    """
    target = step_folder(run_dir, step)
    remove_leftovers(run_dir)
    with atomic_folder(target) as temporary:
        write_model(temporary)
        save_training_state(temporary / TRAINING_STATE_NAME, tensors, meta)
    return target


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after that step belongs."""
    return run_dir / f"step-{step:08d}"


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """The step folders of a run, oldest first; unfinished ones are not among them."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(cast("re.Match[str]", _STEP_NAME.fullmatch(path.name)).group(1)))


def latest_valid(run_dir: Path) -> Path:
    """The newest step folder whose weights and training state match their manifests.

    Damaged folders are logged and skipped. Raises: CheckpointError when none is left.
    """
    problems: list[str] = []
    for folder in reversed(checkpoint_dirs(run_dir)):
        try:
            verify_manifest(folder / TRAINING_STATE_NAME)
            verify_manifest(folder)
        except CheckpointError as error:
            _log.warning("skipping damaged checkpoint: %s", error)
            problems.append(str(error))
        else:
            return folder
    reason = "; ".join(problems[:3]) or "it has no folder step-<number>"
    raise CheckpointError(f"no usable checkpoint in {str(run_dir)!r}: {reason}; start a new run or restore a backup")
