"""Partial rotary position embedding in the rotate-half layout.

Suffixes: B batch, T tokens, H heads, K QK dim, R half of the rotated dims.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(position_ids_BT: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, always in fp32.

    Shapes: -> two of (B, T, 1, R) with R = rotary_dim / 2; the 1 broadcasts over heads.
    """
    exponents_R = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids_BT.device) / rotary_dim
    inverse_frequencies_R = 1.0 / (theta**exponents_R)
    angles_BT1R = position_ids_BT[..., None, None].float() * inverse_frequencies_R
    return angles_BT1R.cos(), angles_BT1R.sin()


def rotate(x_BTHK: Tensor, cos_BT1R: Tensor, sin_BT1R: Tensor) -> Tensor:
    """Rotate dimension i with dimension i + R for i < R; dimensions from 2R on pass through.

    The tables are cast to x's dtype before the products, as the published code does.
    """
    half = cos_BT1R.shape[-1]
    cos, sin = cos_BT1R.to(x_BTHK.dtype), sin_BT1R.to(x_BTHK.dtype)
    first, second, rest = x_BTHK.split((half, half, x_BTHK.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
