"""AdamW over fp32 masters in C++: the gradient's norm in one pass, clipping, update and cast in a second one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openmimo.kernels.native import native_kernels
from openmimo.kernels.training import call

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Slot:
    """One parameter with its gradient, its fp32 master and moments, and the number of updates after this one."""

    parameter: Tensor
    grad: Tensor
    master: Tensor
    first: Tensor
    second: Tensor
    num_updates: int
    weight_decay: float


def adamw_usable(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take these parameters or gradients: bf16 or fp32, dense, on the CPU."""
    plain = all(t.device.type == "cpu" and t.dtype in _DTYPES and t.is_contiguous() for t in tensors)
    return plain and native_kernels().library is not None


def gradient_norm(slots: Sequence[Slot], *, count_zeros: bool = True) -> tuple[float, list[int]]:
    """Root of the sum of all squared gradients: fp32 within 16,384 entries, float64 across.

    With `count_zeros` also, from the same pass, how many entries of each slot's gradient are exactly zero.
    """
    norm = torch.zeros((), dtype=torch.float64)
    zeros = torch.zeros(len(slots), dtype=torch.int64) if count_zeros else None
    call("gradient_norm", _table(slots), norm, zeros, len(slots), num_elements=_num_elements(slots))
    return float(norm), [] if zeros is None else zeros.tolist()


def adamw_update(
    slots: Sequence[Slot], *, learning_rate: float, grad_factor: float, betas: tuple[float, float], eps: float
) -> None:
    """Update masters and moments from the gradients times `grad_factor`, and write the masters into the parameters."""
    rates = [
        (
            1.0 - learning_rate * slot.weight_decay,
            learning_rate / (1.0 - betas[0] ** slot.num_updates),
            1.0 / math.sqrt(1.0 - betas[1] ** slot.num_updates),
        )
        for slot in slots
    ]
    scalars = (len(slots), grad_factor, *betas, eps)
    call("adamw", _table(slots), torch.tensor(rates), *scalars, num_elements=_num_elements(slots))


def _table(slots: Sequence[Slot]) -> Tensor:
    rows: list[tuple[int, ...]] = []
    for slot in slots:
        tensors = (slot.master, slot.first, slot.second, slot.grad, slot.parameter)
        assert all(tensor.is_contiguous() and tensor.numel() == slot.master.numel() for tensor in tensors)
        assert slot.grad.dtype is slot.parameter.dtype
        addresses = (tensor.data_ptr() for tensor in tensors)
        rows.append((*addresses, slot.master.numel(), int(slot.grad.dtype is torch.bfloat16)))
    return torch.tensor(rows, dtype=torch.int64)


def _num_elements(slots: Sequence[Slot]) -> int:
    return sum(slot.master.numel() for slot in slots)
