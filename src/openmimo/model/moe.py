"""Feed-forward layers: dense SwiGLU, and the sparse mixture with a sigmoid router.

Suffixes: N tokens (batch and time flattened), D hidden, E experts, k chosen experts, F expert width, M = N * k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmimo.config.model import MoEConfig
from openmimo.kernels import invariant
from openmimo.kernels import training as kernels
from openmimo.kernels.experts import experts as fused_experts
from openmimo.kernels.experts import experts_usable
from openmimo.kernels.router import route, router_usable
from openmimo.model.linear import HasInvariantForm, Linear


class DenseMLP(HasInvariantForm, nn.Module):
    """SwiGLU with the gate and up projections stacked (gate rows first)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_BTD), is_invariant=self.invariant))


def swiglu(gate_up: Tensor, *, is_invariant: bool = False) -> Tensor:
    """silu(gate) * up for the two halves of the last dim."""
    if kernels.usable(gate_up) and not is_invariant:
        return kernels.swiglu(gate_up)
    return _SwiGLU.apply(gate_up, is_invariant)  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    """Saves only its input and writes both gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, is_invariant: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return (gate * invariant.sigmoid(gate) if is_invariant else F.silu(gate)).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors  # once: under activation recomputation a second time fails
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_up.copy_(F.silu(gate).mul_(grad))
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_gate_up, None


class Routing(NamedTuple):
    """What the router decided for each token: all scores before the bias, chosen experts, their weights."""

    scores_NE: Tensor
    experts_Nk: Tensor
    weights_Nk: Tensor


class Router(HasInvariantForm, nn.Module):
    """fp32 sigmoid scores; the bias takes part in the choice of experts and never in their weights.

    Source: MiMo-V2-Flash report, section on sparse layers; balance by bias as in DeepSeek-V3.
    """

    e_score_correction_bias: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size, dtype=torch.float32))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor, replay_Nk: Tensor | None = None) -> Routing:
        """Choose experts, or take them from `replay_Nk`.

        Replayed experts get their weights from the full scores of this pass, so the router receives a gradient
        for each of them even where it would have chosen others.
        """
        if router_usable(x_ND, self.weight) and not self.invariant:
            scores_NE, experts_Nk, weights_Nk = route(
                x_ND,
                self.weight,
                self.e_score_correction_bias,
                replay_Nk,
                num_choices=self.config.num_experts_per_token,
                normalize=self.config.normalize_weights,
                scaling=self.config.routed_scaling,
            )
            return Routing(scores_NE, experts_Nk, weights_Nk)
        if self.invariant:
            scores_NE = invariant.sigmoid(invariant.linear(x_ND, self.weight.to(x_ND.dtype)))
        else:
            scores_NE = torch.sigmoid(F.linear(x_ND.float(), self.weight.float()))
        if replay_Nk is not None:
            experts_Nk = replay_Nk.to(torch.int64)
        else:
            experts_Nk = self._choose(scores_NE.detach() + self.e_score_correction_bias)
        weights_Nk = scores_NE.gather(1, experts_Nk)
        if self.config.normalize_weights:
            total_N1 = _sum_choices(weights_Nk)[:, None] if self.invariant else weights_Nk.sum(-1, keepdim=True)
            weights_Nk = weights_Nk / (total_N1 + 1e-20)
        return Routing(scores_NE, experts_Nk, weights_Nk * self.config.routed_scaling)

    def _choose(self, choice_NE: Tensor) -> Tensor:
        num_choices = self.config.num_experts_per_token
        if self.invariant:  # of equal scores the first expert wins, whatever the batch
            return choice_NE.sort(dim=-1, descending=True, stable=True).indices[:, :num_choices]
        return choice_NE.topk(num_choices, dim=-1).indices


def _sum_choices(x_Nk: Tensor) -> Tensor:
    """The sum over dim 1, first choice first."""
    first, *others = x_Nk.unbind(1)
    return sum(others, start=first)


ExchangeExperts = Callable[["Experts", Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (rows, weights (E, in, out), each group's end) -> rows, as `grouped_product`.
GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]

# Passes over a weight that is copied and multiplied, against one that is only multiplied.
COPY_COST = 3


class Experts(HasInvariantForm, nn.Module):
    """All experts' SwiGLU weights, stacked; tokens are sorted by expert and each expert runs once.

    No capacity limit and no loop over tokens: the sort is the dispatch, its inverse the combine. Each expert's rows
    start at a multiple of `ROW_MULTIPLE`, so that matrix products come in few sizes: libraries that generate code
    per size (oneDNN) would otherwise spend more time on that than on the product, as loads change every step.
    With `exchange`, (experts, x, chosen experts, weights) -> the same result, that takes the place of all this: callers
    that keep other experts elsewhere bring one. `product` takes the place of the products alone.
    """

    exchange: ExchangeExperts | None = None
    product: GroupedProduct | None = None

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_dim, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.expert_dim))

    def forward(
        self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor, *, static: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Shapes: -> (N, D) and the number of tokens that each expert received, (E,)."""
        if static:
            return self._static(x_ND, experts_Nk, weights_Nk)
        if self.exchange is not None:
            return self.exchange(self, x_ND, experts_Nk, weights_Nk)
        weights = (self.gate_up_proj, self.down_proj)
        return run_experts(x_ND, experts_Nk, weights_Nk, *weights, is_invariant=self.invariant, product=self.product)

    def _static(self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> tuple[Tensor, Tensor]:
        """The same for few tokens, with nothing that depends on the choices but values.

        Either the chosen weights are copied side by side, or every expert runs on every token: while tokens are few,
        products cost what reading their weights costs, and a copy reads and writes once more.
        """
        weights_Nk = weights_Nk.to(x_ND.dtype)
        num_experts = self.down_proj.shape[0]
        if COPY_COST * experts_Nk.numel() <= num_experts:
            x_NkD1 = x_ND[:, None, :, None].expand(-1, experts_Nk.shape[1], -1, -1)
            hidden_NkF = swiglu((self.gate_up_proj[experts_Nk] @ x_NkD1).squeeze(-1))
            y_NkD = (self.down_proj[experts_Nk] @ hidden_NkF[..., None]).squeeze(-1)
            y_ND = (y_NkD * weights_Nk[..., None]).sum(1)
        else:
            hidden_ENF = swiglu(x_ND @ self.gate_up_proj.transpose(1, 2))
            y_END = hidden_ENF @ self.down_proj.transpose(1, 2)
            weights_NE = x_ND.new_zeros(x_ND.shape[0], num_experts).scatter(1, experts_Nk, weights_Nk)
            y_ND = (y_END * weights_NE.T[..., None]).sum(0)
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=x_ND.device)
        return y_ND, counts_E.scatter_add(0, experts_Nk.flatten(), torch.ones_like(experts_Nk.flatten()))


def run_experts(
    x_ND: Tensor,
    experts_Nk: Tensor,
    weights_Nk: Tensor,
    gate_up_proj_E2FD: Tensor,
    down_proj_EDF: Tensor,
    *,
    is_invariant: bool = False,
    product: GroupedProduct | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts' weighted sum for each token, (N, D), and the number of tokens of each expert, (E,)."""
    if experts_usable(x_ND, down_proj_EDF) and not is_invariant and product is None:
        return fused_experts(x_ND, experts_Nk, weights_Nk, gate_up_proj_E2FD, down_proj_EDF)
    num_experts, top_k = down_proj_EDF.shape[0], experts_Nk.shape[1]
    place_M, ends_E, tokens_per_expert_E = expert_rows(experts_Nk, num_experts)
    num_rows = place_M.shape[0] + (_row_multiple(place_M.shape[0], num_experts) - 1) * num_experts
    x_PD: Tensor = _Dispatch.apply(x_ND, place_M, num_rows)  # type: ignore[assignment]
    if is_invariant:
        hidden_PF = swiglu(invariant.grouped_product(x_PD, gate_up_proj_E2FD, ends_E), is_invariant=True)
        y_PD = invariant.grouped_product(hidden_PF, down_proj_EDF, ends_E)
    else:
        product = product or grouped_product
        hidden_PF = swiglu(product(x_PD, gate_up_proj_E2FD.transpose(1, 2), ends_E))
        y_PD = product(hidden_PF, down_proj_EDF.transpose(1, 2), ends_E)
    y_NkD = y_PD.index_select(0, place_M).unflatten(0, (-1, top_k))
    y_NkD = y_NkD * weights_Nk[..., None].to(y_NkD.dtype)
    return _sum_choices(y_NkD) if is_invariant else y_NkD.sum(1), tokens_per_expert_E


def grouped_product(x_PD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Rows up to each group's end times that group's matrix; rows behind the last group are unspecified.

    The library's kernel wants rows of whole 16-byte units; other widths and float64 take one product per expert.
    """
    aligned = all(dim * x_PD.element_size() % 16 == 0 for dim in weight_EDF.shape[1:])
    if aligned and x_PD.dtype is not torch.float64:
        return F.grouped_mm(x_PD, weight_EDF, offs=ends_E)
    ends = ends_E.tolist()
    groups = [x_PD[start:end] @ weight for start, end, weight in zip([0, *ends], ends, weight_EDF, strict=False)]
    rest = x_PD.new_zeros(x_PD.shape[0] - ends[-1], weight_EDF.shape[2])
    return torch.cat([*groups, rest])


# A group's first row is a multiple of this when there are enough rows for the padding to be small beside them.
ROW_MULTIPLE = 64


def expert_rows(experts_Nk: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each (token, choice) goes when rows are grouped by expert.

    Shapes: -> place (M,), end of each expert's padded group (E,) int32, tokens per expert (E,).
    """
    experts_M = experts_Nk.flatten()
    multiple = _row_multiple(experts_M.shape[0], num_experts)
    sorted_M, order_M = experts_M.sort(stable=True)
    experts_E = torch.arange(num_experts, device=experts_M.device)
    ends_E = torch.searchsorted(sorted_M, experts_E, right=True)
    tokens_per_expert_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    padded_ends_E = ((tokens_per_expert_E + multiple - 1) // multiple * multiple).cumsum(0)
    # Shift of each group: where its padded rows end, less where its sorted rows end and its own padding.
    shift_E = (
        padded_ends_E - (tokens_per_expert_E + multiple - 1) // multiple * multiple - (ends_E - tokens_per_expert_E)
    )
    rows_M = torch.arange(order_M.shape[0], device=order_M.device) + shift_E[sorted_M]
    place_M = torch.empty_like(order_M).scatter_(0, order_M, rows_M)
    return place_M, padded_ends_E.to(torch.int32), tokens_per_expert_E


def _row_multiple(num_rows: int, num_experts: int) -> int:
    return ROW_MULTIPLE if num_rows >= 4 * ROW_MULTIPLE * num_experts else 1


class _Dispatch(torch.autograd.Function):
    """Copy token rows into their places in expert order; rows between groups are zero.

    Backward sums each token's copies with a gather.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, place_M: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(place_M)
        ctx.top_k = place_M.shape[0] // x_ND.shape[0]
        x_PD = x_ND.new_zeros(num_rows, x_ND.shape[1])
        return x_PD.index_copy_(0, place_M, x_ND.repeat_interleave(ctx.top_k, dim=0))

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (place_M,) = ctx.saved_tensors
        return grad_PD.index_select(0, place_M).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class LayerRouting(NamedTuple):
    """One sparse layer's routing of a batch: chosen experts, tokens per expert, sequence balance loss."""

    experts_BTk: Tensor
    tokens_per_expert_E: Tensor
    balance_loss: Tensor


class SparseMLP(nn.Module):
    """Router and experts."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config)

    def forward(
        self, x_BTD: Tensor, replay_BTk: Tensor | None = None, *, static: bool = False
    ) -> tuple[Tensor, LayerRouting]:
        shape = x_BTD.shape
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND, None if replay_BTk is None else replay_BTk.flatten(0, 1))
        y_ND, tokens_per_expert_E = self.experts(x_ND, routing.experts_Nk, routing.weights_Nk, static=static)
        experts_BTk = routing.experts_Nk.unflatten(0, shape[:2])
        loss = x_BTD.new_zeros((), dtype=torch.float32)
        if torch.is_grad_enabled():
            loss = sequence_balance_loss(routing.scores_NE.unflatten(0, shape[:2]), experts_BTk)
        return y_ND.view(shape), LayerRouting(experts_BTk, tokens_per_expert_E, loss)


def sequence_balance_loss(scores_BTE: Tensor, experts_BTk: Tensor) -> Tensor:
    """Mean over sequences of sum_e f_e * p_e: 1 when experts are used evenly, more when they are not.

    f_e is the share of the sequence's choices that fell on e, times E; p_e the mean normalised score.
    Source: the complementary sequence-wise loss of DeepSeek-V3, which the report uses with a small coefficient.
    """
    num_experts = scores_BTE.shape[-1]
    share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
    choices_BM = experts_BTk.flatten(1)
    counts_BE = scores_BTE.new_zeros(choices_BM.shape[0], num_experts)
    counts_BE.scatter_add_(1, choices_BM, torch.ones_like(choices_BM, dtype=counts_BE.dtype))
    chosen_BE = counts_BE * (num_experts / choices_BM.shape[1])
    return (chosen_BE * share_BTE.mean(1)).sum(-1).mean()


@torch.no_grad()
def update_balance_bias(router: Router, tokens_per_expert_E: Tensor, rate: float) -> None:
    """Raise the bias of under-used experts and lower that of over-used ones by `rate`."""
    load_E = tokens_per_expert_E.float()
    router.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)
