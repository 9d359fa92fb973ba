"""Partial rotary position embedding in the rotate-half layout.

Suffixes: B batch, T tokens, H heads, K QK dim, R half of the rotated dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmimo.kernels import invariant


def rotary_tables(
    position_ids_BT: Tensor, rotary_dim: int, theta: float, *, is_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, always in fp32.

    `is_invariant` makes a position's bits independent of the others (see `MiMoModel.set_invariant`).
    Shapes: -> two of (B, T, 1, R) with R = rotary_dim / 2; the 1 broadcasts over heads.
    """
    # Made in one shape and place in the invariant case, so that every device multiplies with the same frequencies.
    device = torch.device("cpu") if is_invariant else position_ids_BT.device
    exponents_R = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    inverse_frequencies_R = (1.0 / (theta**exponents_R)).to(position_ids_BT.device)
    angles_BT1R = position_ids_BT[..., None, None].float() * inverse_frequencies_R
    if is_invariant:
        return invariant.cosine_sine(angles_BT1R)
    return angles_BT1R.cos(), angles_BT1R.sin()


def rotate(x_BTHK: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Rotate dimension i with dimension i + R for i < R; dimensions from 2R on pass through.

    The tables are cast to x's dtype before the products, as the published code does.
    """
    return _Rotate.apply(x_BTHK, cos_BT1R.to(x_BTHK.dtype), sin_BT1R.to(x_BTHK.dtype))  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    """The rotation writes its result once; its gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = cos.shape[-1]
        first, second = x_BTHK[..., :half], x_BTHK[..., half : 2 * half]
        out = torch.empty(x_BTHK.shape, dtype=x_BTHK.dtype, device=x_BTHK.device)
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = second * cos + first * sin
        out[..., 2 * half :] = x_BTHK[..., 2 * half :]
        return out

    @staticmethod
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad_BTHK, cos, -sin), None, None
