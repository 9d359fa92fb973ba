"""Reading and writing single safetensors files; nothing in a file is trusted.

Tensors are read with plain positioned reads instead of a memory map: a file that shrinks meanwhile is an
error then, not a dead process, and no address space is reserved for what is never read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

import torch
from torch import Tensor

from openmimo.checkpoint.manifest import HashingFile
from openmimo.config.strict_json import as_object, open_regular, read_exactly
from openmimo.config.tensor_names import LENGTH_BYTES, read_header
from openmimo.errors import CheckpointError

_MAX_DIMENSIONS = 8

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a header; `begin` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An open safetensors file whose header passed every check; a context manager.

    Raises: CheckpointError on opening when the header is longer than allowed or than the file, is not strict JSON,
    or when tensors have unknown types, overlap, leave gaps or do not match their byte ranges.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        with ExitStack() as on_error:
            on_error.callback(self._file.close)
            self.entries, self.metadata = self._read_header()
            on_error.pop_all()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, *, index: int | None = None) -> Tensor:
        """A fresh copy of a tensor, or of slice `index` of its first dimension. Raises: CheckpointError."""
        entry = self.entries[name]
        begin, shape, num_bytes = entry.begin, entry.shape, entry.end - entry.begin
        if index is not None:
            num_bytes //= shape[0]
            begin, shape = begin + index * num_bytes, shape[1:]
        if num_bytes == 0:
            return torch.empty(shape, dtype=entry.dtype)
        flat_bytes = torch.empty(num_bytes, dtype=torch.uint8)
        self._file.seek(begin)
        read_exactly(self._file, flat_bytes.numpy().data, what=f"tensor {name!r} in {self.path}")
        return flat_bytes.view(entry.dtype).reshape(shape)

    def _read_header(self) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        file_bytes = os.fstat(self._file.fileno()).st_size
        header, start = read_header(self._file, self.path)
        metadata = as_object(header.pop("__metadata__", {}), what=f"__metadata__ of {self.path}")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"__metadata__ of {self.path} must hold strings only; write the file again")
        entries = {name: _parse_entry(name, value, start, self.path) for name, value in header.items()}
        _check_coverage(entries, start, file_bytes, self.path)
        return entries, cast("dict[str, str]", metadata)


def write_safetensors(file: HashingFile, tensors: Mapping[str, Tensor]) -> None:
    """Write named CPU tensors as one safetensors file.

    Wider types come first, so every tensor starts at a multiple of its item size, as other readers require.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise CheckpointError(
                f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; convert it"
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    for name in names:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            file.write(flat.view(torch.uint8).numpy().data)


def _parse_entry(name: str, value: object, start: int, path: Path) -> TensorEntry:
    what = f"tensor {name!r} in {path}"
    fields = as_object(value, what=what)
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what} needs exactly dtype, shape and data_offsets, got {sorted(fields)}; rewrite it")
    code = fields["dtype"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{what} has dtype {code!r}, expected one of {', '.join(_DTYPES)}; convert the file")
    dtype = _DTYPES[code]
    shape = _parse_sizes(fields["shape"], what=f"shape of {what}")
    offsets = _parse_sizes(fields["data_offsets"], what=f"data_offsets of {what}")
    if len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{what} has {len(shape)} dimensions and {len(offsets)} offsets; rewrite the file")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{what} spans {offsets[1] - offsets[0]} bytes, its shape {list(shape)} and dtype {code} need {expected}; "
            "copy the file again"
        )
    return TensorEntry(dtype=dtype, shape=shape, begin=start + offsets[0], end=start + offsets[1])


def _parse_sizes(value: object, *, what: str) -> tuple[int, ...]:
    items = cast("list[object]", value) if isinstance(value, list) else None
    if items is None or not all(type(item) is int and 0 <= item < 2**62 for item in items):
        raise CheckpointError(
            f"{what} must be a list of whole numbers of at least 0, got {value!r:.80}; rewrite the file"
        )
    return tuple(cast("list[int]", items))


def _check_coverage(entries: dict[str, TensorEntry], start: int, file_bytes: int, path: Path) -> None:
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise CheckpointError(f"tensor {name!r} in {path} {problem}; copy the file again")
        position = entry.end
    if position != file_bytes:
        raise CheckpointError(f"{str(path)!r} has {file_bytes} bytes but its tensors end at {position}; copy it again")
