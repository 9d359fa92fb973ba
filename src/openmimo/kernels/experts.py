"""A sparse layer's experts in C++, as one differentiable function on bf16 CPU tensors.

Suffixes: N tokens, D hidden, E experts, k chosen experts, F expert width, M = N * k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels.training import call, usable

# What the packed products want of both dims.
DIM_MULTIPLE = 32


def experts_usable(x_ND: Tensor, down_proj_EDF: Tensor) -> bool:
    """Whether the kernel takes these tensors: bf16 on the CPU, dims in multiples of 32."""
    fits = all(dim % DIM_MULTIPLE == 0 for dim in down_proj_EDF.shape[1:])
    return fits and usable(x_ND) and down_proj_EDF.dtype is x_ND.dtype


def experts(
    x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor, gate_up_proj_E2FD: Tensor, down_proj_EDF: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over a token's chosen experts of weight times down(silu(gate x) * up x).

    Between the products everything is rounded to bf16 where the PyTorch form stores it; sums are in fp32.
    Shapes: -> (N, D) and the number of tokens of each expert (E,).
    Raises: ShapeError if the tensors do not fit together or an expert does not exist.
    """
    num_experts, hidden, width = down_proj_EDF.shape
    if gate_up_proj_E2FD.shape != (num_experts, 2 * width, hidden) or x_ND.shape[1] != hidden:
        raise ShapeError(
            f"experts got tokens {tuple(x_ND.shape)}, gate and up {tuple(gate_up_proj_E2FD.shape)}, down "
            f"{tuple(down_proj_EDF.shape)}; expected (N, D), (E, 2F, D), (E, D, F)"
        )
    if experts_Nk.shape != weights_Nk.shape or experts_Nk.shape[0] != x_ND.shape[0]:
        raise ShapeError(
            f"experts got choices {tuple(experts_Nk.shape)} with weights {tuple(weights_Nk.shape)} for "
            f"{x_ND.shape[0]} tokens"
        )
    num_pairs = experts_Nk.numel()
    if num_pairs and not 0 <= int(experts_Nk.min()) <= int(experts_Nk.max()) < num_experts:
        raise ShapeError(f"experts got the choice {int(experts_Nk.max())}; there are {num_experts} experts")
    order_M, place_M = torch.empty(num_pairs, dtype=torch.int64), torch.empty(num_pairs, dtype=torch.int64)
    begins_E1 = torch.empty(num_experts + 1, dtype=torch.int64)
    choices_Nk = experts_Nk.to(torch.int64).contiguous()
    call("expert_order", choices_Nk, order_M, place_M, begins_E1, num_pairs, num_experts, num_elements=0)
    tensors = (x_ND.contiguous(), weights_Nk.float().contiguous(), gate_up_proj_E2FD, down_proj_EDF)
    y_ND: Tensor = _Experts.apply(*tensors, order_M, place_M, begins_E1)  # type: ignore[no-untyped-call]
    return y_ND, begins_E1.diff()


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_Nk: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        order_M: Tensor,
        place_M: Tensor,
        begins_E1: Tensor,
    ) -> Tensor:
        num_experts, hidden, width = down_proj.shape
        gate_up_M2F = x_ND.new_empty(order_M.shape[0], 2 * width)
        rows_MD, out_ND = x_ND.new_empty(order_M.shape[0], hidden), torch.empty_like(x_ND)
        ctx.sizes = (*weights_Nk.shape, num_experts, hidden, width)
        common = (x_ND, order_M, place_M, begins_E1, weights_Nk, gate_up_proj, down_proj)
        call("experts_forward", *common, gate_up_M2F, rows_MD, out_ND, *ctx.sizes, num_elements=rows_MD.numel())
        ctx.save_for_backward(*common, gate_up_M2F)
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: under activation recomputation a second time fails
        x_ND, _, _, _, weights_Nk, gate_up_proj, down_proj, gate_up_M2F = saved
        hidden, width = down_proj.shape[1:]
        num_pairs = gate_up_M2F.shape[0]
        room = (torch.empty_like(gate_up_M2F), x_ND.new_empty(num_pairs, width), x_ND.new_empty(num_pairs, hidden))
        grads = tuple(torch.empty_like(tensor) for tensor in (x_ND, weights_Nk, gate_up_proj, down_proj))
        tensors = (*saved, grad_ND.contiguous(), *room, *grads)
        call("experts_backward", *tensors, *ctx.sizes, num_elements=num_pairs * hidden)
        return (*grads, None, None, None)
