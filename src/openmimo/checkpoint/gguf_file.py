"""The GGUF container: typed metadata, a table of tensors, aligned data; and the number formats that we write in it.

Source: ggml's gguf.md, version 3, little-endian; `quantize_row_q8_0_ref` for the 8-bit blocks.
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openmimo.errors import CheckpointError

GgufFormat = Literal["float32", "bfloat16", "q8_0"]
GgufValue = bool | int | float | str | Sequence[int] | Sequence[str]
Bytes = npt.NDArray[np.uint8]

BLOCK = 32
_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TENSOR_TYPES: Mapping[GgufFormat, int] = {"float32": 0, "bfloat16": 30, "q8_0": 8}
# Bytes of 32 numbers.
_BLOCK_BYTES: Mapping[GgufFormat, int] = {"float32": 128, "bfloat16": 64, "q8_0": 34}


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """One tensor of a file: `read` yields it in pieces along its first dimension when its turn comes."""

    name: str
    shape: tuple[int, ...]
    format: GgufFormat
    read: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        numbers = int(np.prod(self.shape, dtype=np.int64))
        return numbers * _BLOCK_BYTES[self.format] // BLOCK


def write_gguf_file(path: Path, metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]) -> None:
    """Write a file that appears at `path` whole or not at all. Raises: CheckpointError.   Cost: memory of one piece."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("xb") as file:
                file.write(_header(metadata, tensors))
                for tensor in tensors:
                    _pad(file)
                    _write_tensor(file, tensor)
                _pad(file)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {str(path)!r}: {error}; check the folder and the free space") from error


def encode(tensor: Tensor, format: GgufFormat) -> Bytes:
    """The bytes of a tensor; for `q8_0` the last dimension is a multiple of 32."""
    if format == "float32":
        return tensor.float().contiguous().view(torch.uint8).numpy().reshape(-1)
    if format == "bfloat16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().reshape(-1)
    x_NJ = tensor.float().reshape(-1, BLOCK)
    scale_N1 = x_NJ.abs().amax(1, keepdim=True) / 127
    scaled_NJ = x_NJ * torch.where(scale_N1 > 0, 1 / scale_N1, 0)
    # Halves go away from zero as in C's roundf; torch.round would take them to even.
    whole_NJ = scaled_NJ.abs().floor()
    rounded_NJ = (whole_NJ + ((scaled_NJ.abs() - whole_NJ) >= 0.5)) * scaled_NJ.sign()
    blocks = torch.cat((scale_N1.half().view(torch.uint8), rounded_NJ.to(torch.int8).view(torch.uint8)), dim=1)
    return blocks.numpy().reshape(-1)


def _write_tensor(file: BinaryIO, tensor: GgufTensor) -> None:
    start = file.tell()
    for piece in tensor.read():
        encode(piece, tensor.format).tofile(file)
    written = file.tell() - start
    assert written == tensor.num_bytes, f"{tensor.name}: wrote {written} bytes of {tensor.num_bytes}"


def _header(metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]) -> bytes:
    out = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(value)
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]  # the fastest dimension comes first
        out += _string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", _TENSOR_TYPES[tensor.format], offset)
        offset += -(-tensor.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return bytes(out)


def _typed(value: GgufValue) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    texts = [_string(item) for item in value if isinstance(item, str)]
    numbers = [item for item in value if isinstance(item, int)]
    head = struct.pack("<IIQ", _ARRAY, _STRING if texts else _INT32, len(value))
    return head + b"".join(texts) + struct.pack(f"<{len(numbers)}i", *numbers)


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
