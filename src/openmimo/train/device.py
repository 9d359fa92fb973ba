"""Where a run computes and in which number format; the random state of that place."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from openmimo.config.train import Precision
from openmimo.data.packing import Batch
from openmimo.errors import ConfigError
from openmimo.kernels.native import native_kernels
from openmimo.kernels.products import has_bf16_products


def pick_device(name: str) -> torch.device:
    """The device of a recipe's `device`; `auto` is the GPU where PyTorch sees one.

    Raises: ConfigError when the recipe asks for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name!r} is not there, PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "use device='cpu', or see `openmimo doctor` for the installed build"
        )
    return device


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward; `auto` takes bf16 where that is faster than fp32."""
    if precision is Precision.AUTO:
        return torch.bfloat16 if prefers_bf16(device) else torch.float32
    return torch.float32 if precision is Precision.FP32 else torch.bfloat16


def prefers_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware, or the fused kernels, which take bf16, multiply it in vectors."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_bf16_products() or native_kernels().fast


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch where the model is. Copies to a GPU go on beside its work."""
    if device.type == "cpu":
        return batch
    moved = {
        name: value.pin_memory().to(device, non_blocking=True)
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    return dataclasses.replace(batch, **moved)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every generator that the run draws from, by name."""
    states = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng_cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave; a state of a device that is not used now is left out."""
    torch.set_rng_state(states["rng"])
    if device.type == "cuda" and "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"], device)
