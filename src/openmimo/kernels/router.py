"""The router in C++: fp32 scores, choice and weights from bf16 tokens, as one differentiable function.

Suffixes: N tokens, D hidden, E experts, k chosen experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels.training import call, usable

# Weight gradients are summed in so many slices at most: each takes E * D * 4 bytes.
MAX_SLICES = 16
SLICE_MULTIPLE = 64
DIM_MULTIPLE = 16


def router_usable(x_ND: Tensor, weight_ED: Tensor) -> bool:
    """Whether the kernel takes these tensors: bf16 tokens and fp32 weights on the CPU, hidden a multiple of 16."""
    return usable(x_ND) and weight_ED.dtype is torch.float32 and weight_ED.shape[1] % DIM_MULTIPLE == 0


def route(
    x_ND: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor,
    replay_Nk: Tensor | None,
    *,
    num_choices: int,
    normalize: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid scores (N, E), chosen experts (N, k) and their weights (N, k); `replay_Nk` takes the choice's place.

    The bias takes part in the choice only. Of equal scores the first expert wins.
    Raises: ShapeError if the tensors do not fit together or a replayed expert does not exist.
    """
    num_experts = weight_ED.shape[0]
    if x_ND.shape[1] != weight_ED.shape[1] or not 0 < num_choices <= num_experts:
        raise ShapeError(
            f"router got {num_choices} choices, tokens {tuple(x_ND.shape)} and weights {tuple(weight_ED.shape)}; "
            "expected (N, D) and (E, D) with at most E choices"
        )
    if replay_Nk is not None:
        if replay_Nk.shape != (x_ND.shape[0], num_choices):
            raise ShapeError(f"replayed experts are {tuple(replay_Nk.shape)}, not {(x_ND.shape[0], num_choices)}")
        replay_Nk = replay_Nk.to(torch.int64).contiguous()
        if replay_Nk.numel() and not 0 <= int(replay_Nk.min()) <= int(replay_Nk.max()) < num_experts:
            raise ShapeError(f"replay names expert {int(replay_Nk.max())}; there are {num_experts}")
    settings = (num_choices, int(normalize), scaling)
    return _Route.apply(x_ND.contiguous(), weight_ED, bias_E.float(), replay_Nk, settings)  # type: ignore[no-any-return]


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor,
        replay_Nk: Tensor | None,
        settings: tuple[int, int, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, hidden = x_ND.shape
        scores_NE = torch.empty(rows, weight_ED.shape[0])
        experts_Nk = torch.empty(rows, settings[0], dtype=torch.int64)
        weights_Nk = torch.empty(rows, settings[0])
        ctx.sizes = (rows, hidden, weight_ED.shape[0], *settings)
        tensors = (x_ND, weight_ED, bias_E, replay_Nk, scores_NE, experts_Nk, weights_Nk)
        call("router_forward", *tensors, *ctx.sizes, num_elements=x_ND.numel())
        ctx.save_for_backward(x_ND, weight_ED, scores_NE, experts_Nk)
        ctx.mark_non_differentiable(experts_Nk)
        ctx.set_materialize_grads(False)
        return scores_NE, experts_Nk, weights_Nk

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_scores: Tensor | None, grad_experts: None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_ND, weight_ED, scores_NE, experts_Nk = ctx.saved_tensors
        rows = x_ND.shape[0]
        slice_rows = -(-rows // (MAX_SLICES * SLICE_MULTIPLE)) * SLICE_MULTIPLE
        grad_x = torch.empty_like(x_ND)
        grad_weight = torch.empty(-(-rows // slice_rows), *weight_ED.shape)
        grads = (None if g is None else g.contiguous() for g in (grad_scores, grad_weights))
        tensors = (x_ND, weight_ED, scores_NE, experts_Nk, *grads, grad_x, grad_weight)
        call("router_backward", *tensors, *ctx.sizes, slice_rows, num_elements=x_ND.numel())
        return grad_x, grad_weight.sum(0), None, None, None
