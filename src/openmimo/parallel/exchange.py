"""Experts on several ranks: each token's row goes to the ranks of its experts, and what they made comes back.

Suffixes: N tokens, D hidden, E experts, k chosen experts, M = N * k, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.model.moe import Experts, run_experts
from openmimo.parallel.parts import local


class ExpertExchange:
    """Runs a layer's experts on all ranks' tokens. A rank has `num_experts / size` of them, in the order of ranks."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if num_experts % self.size:
            raise ShapeError(f"{num_experts} experts cannot be divided among {self.size} ranks; choose a divisor")
        self.num_experts, self.num_local = num_experts, num_experts // self.size

    def __call__(self, experts: Experts, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> tuple[Tensor, Tensor]:
        """As `Experts.forward`. The counts are of this rank's tokens, for all experts."""
        num_choices = experts_Nk.shape[1]
        experts_M = experts_Nk.flatten().to(torch.int64)
        order_M = experts_M.argsort(stable=True)
        counts_E = torch.bincount(experts_M, minlength=self.num_experts)
        sent_P = counts_E.view(self.size, self.num_local).sum(1)
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group)
        sent, received = sent_P.tolist(), received_P.tolist()
        rows_MD = self._exchange(x_ND.index_select(0, order_M // num_choices), sent, received)
        ids_M = self._exchange(experts_M[order_M], sent, received) - self.rank * self.num_local
        made_MD = self._exchange(self._run(experts, rows_MD, ids_M), received, sent)
        place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        y_NkD = made_MD.index_select(0, place_M).unflatten(0, (-1, num_choices))
        return (y_NkD * weights_Nk[..., None].to(y_NkD.dtype)).sum(1), counts_E

    def _run(self, experts: Experts, rows_MD: Tensor, ids_M: Tensor) -> Tensor:
        """This rank's experts on the rows that it got, and on one row of zeros, so that there always is a gradient."""
        rows_MD, ids_M1 = F.pad(rows_MD, (0, 0, 0, 1)), F.pad(ids_M, (0, 1))[:, None]
        weights_M1 = torch.ones(ids_M1.shape, dtype=torch.float32, device=rows_MD.device)
        gate_up, down = self._weight(experts.gate_up_proj), self._weight(experts.down_proj)
        return run_experts(rows_MD, ids_M1, weights_M1, gate_up, down, product=experts.product)[0][:-1]

    def _weight(self, weight: Tensor) -> Tensor:
        """This rank's experts. Tokens of all ranks meet here, so a gradient is their sum where others are a mean."""
        weight = local(weight)
        if weight.requires_grad:
            weight.register_hook(lambda grad: grad / self.size)
        return weight

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return _Exchange.apply(rows, sent, received, self.group)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """Rows in the order of the ranks that they go to -> rows in the order of those that they come from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        sent, received = ctx.sizes
        out = grad.new_empty(sum(sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), sent, received, group=ctx.group)
        return out, None, None, None
