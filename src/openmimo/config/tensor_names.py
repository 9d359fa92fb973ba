"""Which tensors the files of a checkpoint folder hold, and the number of MTP heads that follows: without PyTorch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from openmimo.config.io import read_model_config
from openmimo.config.model import ModelConfig
from openmimo.config.strict_json import as_object, open_regular, parse_json_object, read_exactly, read_json_object
from openmimo.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MTP_PREFIX = "model.mtp.layers."
MAX_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
# Logged with the folder where a configuration names heads and the files hold none.
NO_HEADS = "%s holds no MTP heads; loading the model without them"
_MAX_INDEX_BYTES = 100_000_000


def read_present_config(folder: Path) -> ModelConfig:
    """The configuration of a checkpoint folder with the MTP heads that its files hold.

    Raises: ConfigError for an unusable config.json, CheckpointError if the names of tensors cannot be read.
    """
    return with_present_mtp_heads(read_model_config(folder), read_tensor_names(folder))


def with_present_mtp_heads(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """Take the number of MTP heads from the files where the configuration cannot know it."""
    present = {index for index in map(mtp_head_index, names) if index is not None}
    if not present and config.num_mtp_heads:
        return config.replace(num_mtp_heads=0)
    # transformers drops the number of heads from its config.json; gaps in their numbers show up as missing tensors.
    return config if config.num_mtp_heads else config.replace(num_mtp_heads=len(present))


def mtp_head_index(name: str) -> int | None:
    """The MTP head that a Hub tensor name belongs to, or None."""
    match = re.match(re.escape(MTP_PREFIX) + r"([0-9]{1,8})\.", name)
    return int(match.group(1)) if match else None


def read_tensor_names(folder: Path) -> list[str]:
    """The names in the index, or in the only file. Raises: CheckpointError."""
    weight_map = read_weight_map(folder)
    if weight_map is not None:
        return list(weight_map)
    path = folder / SINGLE_NAME
    with open_regular(path) as file:
        header, _ = read_header(file, path)
    return [name for name in header if name != "__metadata__"]


def read_weight_map(folder: Path) -> dict[str, object] | None:
    """Tensor name -> file name from the index, unchecked; None for a folder with one file and no index."""
    if not (folder / INDEX_NAME).exists():
        if not (folder / SINGLE_NAME).exists():
            raise CheckpointError(
                f"{str(folder)!r} has neither {INDEX_NAME} nor {SINGLE_NAME}; is it a checkpoint folder?"
            )
        return None
    index = read_json_object(folder / INDEX_NAME, max_bytes=_MAX_INDEX_BYTES)
    return as_object(index.get("weight_map"), what=f"weight_map in {folder / INDEX_NAME}")


def read_header(file: BinaryIO, path: Path) -> tuple[dict[str, object], int]:
    """The JSON header of a safetensors file, and where it ends. Raises: CheckpointError."""
    file_bytes = os.fstat(file.fileno()).st_size
    if file_bytes < LENGTH_BYTES:
        raise CheckpointError(f"{str(path)!r} has {file_bytes} bytes, too few for a header; copy it again")
    length = int.from_bytes(_read_bytes(file, LENGTH_BYTES, path), "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES):
        raise CheckpointError(
            f"{str(path)!r} announces a header of {length} bytes in a file of {file_bytes} "
            f"(limit {MAX_HEADER_BYTES}); copy the file again"
        )
    return parse_json_object(_read_bytes(file, length, path), what=f"header of {path}"), LENGTH_BYTES + length


def _read_bytes(file: BinaryIO, count: int, path: Path) -> bytes:
    content = bytearray(count)
    read_exactly(file, memoryview(content), what=f"header of {path}")
    return bytes(content)
