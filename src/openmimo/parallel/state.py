"""Training state that each rank writes its part of, and that any number of ranks reads.

Files are safetensors by PyTorch Distributed Checkpoint: no pickle, and a part's place in the whole is in its header.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from openmimo.checkpoint.files import atomic_folder, remove_leftovers
from openmimo.checkpoint.manifest import FileRecord, hash_file, write_manifest
from openmimo.checkpoint.training_state import META_NAME, TRAINING_STATE_NAME, step_folder
from openmimo.errors import CheckpointError
from openmimo.parallel.ranks import Ranks

# The format has no tensors without dimensions where there are parts.
SCALAR = "scalar."

Allocate = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Room for a tensor of that name, whole or divided."""


def save_parts(
    run_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], object],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, object],
    ranks: Ranks,
) -> Path:
    """As `save_step`, by all ranks together, which must see the same files; the first writes what `write_model` makes.

    Raises: CheckpointError.
    """
    target = step_folder(run_dir, step)
    if not ranks.is_first:
        write_model(target)
        folder = Path(ranks.by_first(lambda: ""))
        write_parts(folder, tensors, meta, ranks)
    else:
        remove_leftovers(run_dir)
        with atomic_folder(target) as temporary:
            write_model(temporary)
            folder = temporary / TRAINING_STATE_NAME
            folder.mkdir()
            ranks.by_first(lambda: str(folder))
            write_parts(folder, tensors, meta, ranks)
    ranks.wait()
    return target


def write_parts(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, object], ranks: Ranks) -> None:
    """Write this rank's part into a folder that all ranks see; the first adds `meta` and the manifest.

    Tensors that are not divided must be the same on all ranks. Raises: CheckpointError, on all ranks if on one.
    """
    state = {SCALAR + name if tensor.ndim == 0 else name: _as_row(tensor) for name, tensor in tensors.items()}
    problem = ""
    records: dict[str, FileRecord] = {}
    try:
        with _quiet():
            dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        records = {path.name: hash_file(path) for path in folder.glob(f"shard-{ranks.rank + 1:05d}-*")}
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        problem = f"rank {ranks.rank} cannot write its part of {str(folder)!r}: {error}"
    gathered: list[tuple[str, dict[str, FileRecord]]] = [("", {})] * ranks.size
    dist.all_gather_object(gathered, (problem, records))
    problems = [each for each, _ in gathered if each]
    if problems:
        raise CheckpointError(f"{problems[0]}; free space or choose another folder")
    if ranks.is_first:
        text = json.dumps(dict(meta), allow_nan=False, sort_keys=True)
        (folder / META_NAME).write_text(text, encoding="utf-8")
        known = {name: record for _, part in gathered for name, record in part.items()}
        write_manifest(folder, {**known, META_NAME: hash_file(folder / META_NAME)})
    ranks.wait()


def read_parts(folder: Path, allocate: Allocate, ranks: Ranks | None) -> dict[str, Tensor]:
    """All tensors of a state that any number of ranks wrote, in the room that `allocate` gives them.

    Raises: CheckpointError.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        state: dict[str, Tensor] = {}
        for key, about in reader.read_metadata().state_dict_metadata.items():
            size, dtype = about.size, about.properties.dtype  # type: ignore[union-attr]
            is_scalar = key.startswith(SCALAR)
            state[key] = torch.empty(size, dtype=dtype) if is_scalar else allocate(key, size, dtype)
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=ranks is None)
    except Exception as error:
        raise CheckpointError(f"cannot read the training state in {str(folder)!r}: {error}") from error
    return {name.removeprefix(SCALAR): (x[0] if name.startswith(SCALAR) else x) for name, x in state.items()}


def _as_row(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


@contextmanager
def _quiet() -> Generator[None]:
    """The library warns of what is meant here: no process group where one process reads alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
