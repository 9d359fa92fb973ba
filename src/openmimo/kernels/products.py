"""Matrix products of bf16 CPU tensors where the processor has no instructions for them.

PyTorch emulates such products at a few percent of the speed of fp32 ones. Here the operands become fp32 for the
product, and the result is rounded once, which is what hardware for bf16 does too.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Fewer rows are bound by reading the weights, which PyTorch does as fast in bf16.
FEWEST_ROWS = 16
HARDWARE_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@cache
def has_bf16_products() -> bool:
    """Whether the processor multiplies bf16 in hardware (AVX-512 BF16, AMX or Arm BF16); False if it does not tell."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and not HARDWARE_FLAGS.isdisjoint(flags.read_text().split())


def through_fp32(x: Tensor) -> bool:
    """Whether `matmul` and `linear` take a way of their own for this left operand."""
    return (
        x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and not has_bf16_products()
        and not torch.compiler.is_compiling()
    )


def matmul(a_NK: Tensor, b_KM: Tensor) -> Tensor:
    """a @ b in their dtype. Not differentiable where `through_fp32`; use `linear`."""
    return (a_NK.float() @ b_KM.float()).to(a_NK.dtype) if through_fp32(a_NK) else a_NK @ b_KM


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T, differentiable.   Shapes: (..., I) -> (..., O)."""
    if not through_fp32(x) or weight_OI.dtype is not x.dtype:
        return F.linear(x, weight_OI)
    y_NO: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight_OI)  # type: ignore[no-untyped-call]
    return y_NO.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return matmul(x_NI, weight_OI.T)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x_NI, weight_OI = ctx.saved_tensors
        grad_x, grad_weight = None, None
        grad_NO = grad_NO.float()
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OI.float()).to(x_NI.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_NO.T @ x_NI.float()).to(weight_OI.dtype)
        return grad_x, grad_weight
