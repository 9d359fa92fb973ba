"""Write checkpoints: Hub tensor names, shards with an index, a manifest, one atomic folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from openmimo.checkpoint.fp8 import Quantized, RankGrid, quantize, quantize_ranks, rank_grid
from openmimo.checkpoint.manifest import FolderWriter, folder_writer
from openmimo.checkpoint.names import SCALE_SUFFIX, HubTensor, hub_tensors, pair_of
from openmimo.checkpoint.safetensors_io import write_safetensors
from openmimo.config.hub import Layout, to_hub
from openmimo.config.io import CONFIG_NAME
from openmimo.config.model import ModelConfig
from openmimo.config.native import to_native
from openmimo.config.tensor_names import INDEX_NAME
from openmimo.errors import CheckpointError, nearest
from openmimo.model.model import MiMoModel

SaveDtype = Literal["bfloat16", "float32", "fp8"]

MAX_SHARD_BYTES = 2 << 30
_LAYOUTS = ("hub", "native")
_PLAIN_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.bfloat16}
_MTP_FILE = "model_mtp.safetensors"


class TensorSource(Protocol):
    """Where the tensors of a checkpoint come from, one at a time."""

    def read(self, tensor: HubTensor) -> Tensor:
        """The tensor as floating-point numbers."""
        ...

    def quantized(self, tensor: HubTensor) -> tuple[Quantized, RankGrid | None] | None:
        """The tensor's FP8 form and its rank-wise grid, if it is stored as FP8."""
        ...


class ModelSource:
    """The tensors of a model in memory; slices, not copies."""

    def __init__(self, model: MiMoModel) -> None:
        self._state = model.state_dict()

    def read(self, tensor: HubTensor) -> Tensor:
        return tensor.of(self._state[tensor.target]).detach()

    def quantized(self, tensor: HubTensor) -> None:
        return None


def save_model(
    model: MiMoModel,
    folder: str | Path,
    *,
    layout: Layout = "hub",
    dtype: SaveDtype = "bfloat16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, Path | bytes] | None = None,
) -> None:
    """Write a model as a checkpoint folder; an existing folder is replaced in one step.

    `hub` is the published layout; `native` the one that transformers writes itself: the same tensors (MTP heads
    included, which transformers ignores) beside another config.json. `fp8` quantises what the published checkpoint
    quantises and keeps the rest in bfloat16; router weights and biases are always float32.
    Raises: CheckpointError when the folder cannot be written; ConfigError when `native` cannot express the model.
    Cost: one shard of extra memory.
    """
    write_checkpoint(
        Path(folder),
        model.config,
        ModelSource(model),
        layout=layout,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        extra_files=extra_files or {},
    )


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    source: TensorSource,
    *,
    layout: Layout,
    dtype: SaveDtype,
    max_shard_bytes: int,
    extra_files: Mapping[str, Path | bytes],
) -> None:
    """Write a checkpoint folder from any source of tensors. Raises: CheckpointError, ConfigError."""
    for value, known in ((layout, _LAYOUTS), (dtype, _PLAIN_DTYPES)):
        if value not in known:
            raise CheckpointError(f"cannot write {value!r}; {nearest(value, known)}")
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    config_json = _config_json(config, layout, dtype)
    with folder_writer(folder) as writer:
        shards = _ShardWriter(writer, max_shard_bytes)
        for tensor in hub_tensors(config):
            for name, stored in _stored_forms(tensor, config, source, layout=layout, dtype=dtype):
                shards.add(name, stored, is_mtp=tensor.is_mtp)
        shards.finish()
        writer.add_bytes(CONFIG_NAME, config_json)
        for name, content in extra_files.items():
            if isinstance(content, bytes):
                writer.add_bytes(name, content)
            else:
                writer.add_copy(name, content)


class _ShardWriter:
    """Collects tensors until a shard is full; MTP tensors go to a file of their own."""

    def __init__(self, writer: FolderWriter, max_bytes: int) -> None:
        self._writer = writer
        self._max_bytes = max_bytes
        self._pending: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor, *, is_mtp: bool) -> None:
        size = tensor.numel() * tensor.element_size()
        if not is_mtp:
            if self._pending[False] and self._pending_bytes + size > self._max_bytes:
                self._flush()
            self._pending_bytes += size
        self._pending[is_mtp][name] = tensor
        self._total_bytes += size

    def finish(self) -> None:
        """Write what is left, name the shards, and write the index."""
        self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            file_name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            self._writer.rename(_unnamed(number), file_name)
            weight_map |= dict.fromkeys(names, file_name)
        if self._pending[True]:
            self._write(_MTP_FILE, self._pending[True])
            weight_map |= dict.fromkeys(self._pending[True], _MTP_FILE)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        self._writer.add_bytes(INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())

    def _flush(self) -> None:
        tensors = self._pending[False]
        self._shards.append(list(tensors))
        self._write(_unnamed(len(self._shards)), tensors)
        self._pending[False], self._pending_bytes = {}, 0

    def _write(self, file_name: str, tensors: Mapping[str, Tensor]) -> None:
        with self._writer.create(file_name) as file:
            write_safetensors(file, tensors)


def _unnamed(number: int) -> str:
    return f"shard-{number:05d}"


def _stored_forms(
    tensor: HubTensor, config: ModelConfig, source: TensorSource, *, layout: Layout, dtype: SaveDtype
) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors that one weight becomes in the files."""
    if dtype != "fp8" or not tensor.fp8:
        yield tensor.name, source.read(tensor).to(torch.float32 if tensor.fp32 else _PLAIN_DTYPES[dtype])
        return
    quantized = _quantize(tensor, config, source, layout)
    yield tensor.name, quantized.weight
    yield tensor.name + SCALE_SUFFIX, quantized.scale


def _quantize(tensor: HubTensor, config: ModelConfig, source: TensorSource, layout: Layout) -> Quantized:
    """The FP8 form of a weight; bytes that are already on the wanted grid pass through unchanged."""
    # transformers dequantises with plain blocks only, so its layout never gets the rank-wise grid.
    grid = rank_grid(config.global_attention) if layout == "hub" and tensor.pair is not None else None
    present = source.quantized(tensor)
    if present is not None and present[1] == grid:
        return present[0]
    weight = source.read(tensor)
    if grid is None:
        return quantize(weight)
    other = source.read(pair_of(config, tensor))
    if tensor.is_key:
        return quantize_ranks(weight, other, grid)[0]
    return quantize_ranks(other, weight, grid)[1]


def _config_json(config: ModelConfig, layout: Layout, dtype: SaveDtype) -> bytes:
    number_format = "float32" if dtype == "float32" else "bfloat16"
    if layout == "hub":
        content = to_hub(config, quantized=dtype == "fp8", extra={"torch_dtype": number_format})
    else:
        content = to_native(config, quantized=dtype == "fp8", extra={"dtype": number_format})
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
