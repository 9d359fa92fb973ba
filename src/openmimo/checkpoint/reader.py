"""Reading a checkpoint folder tensor by tensor, whatever its layout, shards and number formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from openmimo.checkpoint.files import is_plain_name, recover_folder
from openmimo.checkpoint.fp8 import (
    FP8,
    Quantized,
    RankGrid,
    RowScaled,
    log_grid_support,
    rank_grid,
    row_scaled,
    row_scaled_ranks,
    scale_shape,
)
from openmimo.checkpoint.names import SCALE_SUFFIX, HubTensor
from openmimo.checkpoint.safetensors_io import SafetensorsFile, TensorEntry
from openmimo.config.io import CONFIG_NAME, read_config_file
from openmimo.config.model import ModelConfig
from openmimo.config.tensor_names import INDEX_NAME, SINGLE_NAME, read_weight_map
from openmimo.errors import CheckpointError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Location:
    """Where a tensor is: its name in the files, and the slice when the files hold it stacked."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class CheckpointReader:
    """An open checkpoint folder; a context manager.

    The index decides which file holds a tensor, so a weight and its scale may be in different files.
    Raises: on opening, CheckpointError when files are missing or malformed or the index and the files disagree,
    ConfigError for an unusable config.json.
    """

    def __init__(self, folder: Path) -> None:
        recover_folder(folder)
        self.folder = folder
        self.config_file = read_config_file(folder / CONFIG_NAME)
        # The transformers FP8 code knows plain blocks only; where a scale shape fits both grids, the layout decides.
        self._prefer_rank_grid = self.config_file.layout == "hub"
        weight_map = _read_weight_map(folder)
        file_names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        with ExitStack() as stack:
            self._files = {name: stack.enter_context(SafetensorsFile(folder / name)) for name in file_names}
            self._owners = _find_owners(self._files, weight_map, folder)
            self._stack = stack.pop_all()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> Iterator[str]:
        return iter(self._owners)

    @property
    def file_names(self) -> list[str]:
        """The files that a load of this folder depends on."""
        index = [INDEX_NAME] if (self.folder / INDEX_NAME).exists() else []
        return [CONFIG_NAME, *index, *self._files]

    def entry(self, name: str) -> TensorEntry | None:
        file = self._owners.get(name)
        return None if file is None else file.entries[name]

    def locate(self, tensor: HubTensor) -> Location | None:
        """Where the files hold `tensor`, under its Hub name or its transformers in-memory name."""
        if tensor.name in self._owners:
            return Location(tensor.name)
        if tensor.alias in self._owners:
            return Location(tensor.alias, tensor.expert, tensor.rows)
        return None

    def problem(self, tensor: HubTensor, location: Location, config: ModelConfig) -> str | None:
        """What is wrong with the shape or number format of a located tensor, in words, or None."""
        entry = self._entry(location.name)
        expected = tensor.shape if location.name == tensor.name else tensor.alias_shape
        if entry.shape != expected:
            return f"{location.name}: shape {list(entry.shape)}, expected {list(expected)}"
        scale = self.entry(location.name + SCALE_SUFFIX)
        if entry.dtype != FP8:
            wrong = entry.dtype not in _FLOATS or scale is not None
            return f"{location.name}: dtype {entry.dtype}, expected float weights without FP8 scales" if wrong else None
        if scale is None:
            return f"{location.name}: FP8 weight without {SCALE_SUFFIX}"
        if len(tensor.shape) != 2 or location.name != tensor.name or scale.dtype != torch.float32:
            return f"{location.name}: FP8 with scales of {scale.dtype}, expected a matrix with float32 scales"
        if scale.shape == scale_shape(tensor.shape):
            return None
        if tensor.pair is None or self.entry(tensor.pair + SCALE_SUFFIX) is None or not self._grid(tensor, config):
            return f"{location.name}: scale shape {list(scale.shape)}, expected {list(scale_shape(tensor.shape))}"
        return None

    def read(self, tensor: HubTensor, config: ModelConfig) -> Tensor:
        """The tensor in its stored format, or dequantised to float32. Call it after `problem` found nothing."""
        quantized = self.row_scaled(tensor, config)
        if quantized is not None:
            return quantized.dequantize()
        location = self.locate(tensor)
        assert location is not None
        part = self._owners[location.name].read(location.name, index=location.expert)
        return part if location.rows is None else part[location.rows[0] : location.rows[1]]

    def quantized(self, tensor: HubTensor, config: ModelConfig) -> tuple[Quantized, RankGrid | None] | None:
        """E4M3 bytes, scales and grid as stored, or None for a tensor that is not FP8."""
        entry = self.entry(tensor.name)
        if entry is None or entry.dtype != FP8:
            return None
        return self._raw(tensor.name), self._grid(tensor, config)

    def row_scaled(self, tensor: HubTensor, config: ModelConfig) -> RowScaled | None:
        """E4M3 bytes as stored with a scale for each row's 128 columns, or None for a tensor that is not FP8."""
        found = self.quantized(tensor, config)
        if found is None:
            return None
        own, grid = found
        if grid is None or tensor.pair is None:
            return row_scaled(own)
        other = self._raw(tensor.pair)
        return row_scaled_ranks(own, other, grid)[0] if tensor.is_key else row_scaled_ranks(other, own, grid)[1]

    def log_grid(self, key: HubTensor, config: ModelConfig) -> None:
        """Log which FP8 grid the data of a global layer's K and V support."""
        grid, used = rank_grid(config.global_attention), self.quantized(key, config)
        if key.pair is not None and used is not None and grid is not None:
            value = self._raw(key.pair).weight
            log_grid_support(key.name, used[0].weight, value, grid, rank_wise=used[1] is not None)

    def _grid(self, tensor: HubTensor, config: ModelConfig) -> RankGrid | None:
        """The rank-wise grid when the scale shapes of K and V say so."""
        grid = None if tensor.pair is None else rank_grid(config.global_attention)
        if grid is None or tensor.pair is None:
            return None
        k_name, v_name = (tensor.name, tensor.pair) if tensor.is_key else (tensor.pair, tensor.name)
        scales = [self.entry(name + SCALE_SUFFIX) for name in (k_name, v_name)]
        rows = [0 if scale is None else scale.shape[0] for scale in scales]
        plain = [scale_shape((grid.num_ranks * size, 1))[0] for size in (grid.qk_head_dim, grid.v_head_dim)]
        if rows != [grid.num_ranks * grid.k_blocks, grid.num_ranks * grid.v_blocks]:
            return None
        return grid if rows != plain or self._prefer_rank_grid else None

    def _raw(self, name: str) -> Quantized:
        scale = name + SCALE_SUFFIX
        return Quantized(self._owners[name].read(name), self._owners[scale].read(scale))

    def _entry(self, name: str) -> TensorEntry:
        return self._owners[name].entries[name]


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index; None for a folder with one file and no index."""
    weight_map = read_weight_map(folder)
    if weight_map is None:
        return None
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not is_plain_name(file_name):
            raise CheckpointError(
                f"{INDEX_NAME} puts {name!r} into {file_name!r:.80}; only files of the folder itself are read"
            )
    return {name: str(file_name) for name, file_name in weight_map.items()}


def _find_owners(
    files: Mapping[str, SafetensorsFile], weight_map: Mapping[str, str] | None, folder: Path
) -> dict[str, SafetensorsFile]:
    if weight_map is None:
        return dict.fromkeys(files[SINGLE_NAME].entries, files[SINGLE_NAME])
    for file_name, file in files.items():
        for name in file.entries:
            if weight_map.get(name) != file_name:
                place = weight_map.get(name, "no file")
                raise CheckpointError(
                    f"{str(folder / file_name)!r} holds {name!r}, the index names {place}; fix the index"
                )
    for name, file_name in weight_map.items():
        if name not in files[file_name].entries:
            raise CheckpointError(f"the index puts {name!r} into {file_name}, which lacks it; copy {file_name} again")
    return {name: files[file_name] for name, file_name in weight_map.items()}
