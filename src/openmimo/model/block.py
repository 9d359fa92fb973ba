"""One transformer layer and the norm it uses. Suffixes: B batch, T tokens, D hidden, k chosen experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from openmimo.config.model import ModelConfig
from openmimo.kernels import invariant
from openmimo.kernels import training as kernels
from openmimo.model.attention import Attention, AttentionPlan
from openmimo.model.cache import LayerCache
from openmimo.model.linear import HasInvariantForm
from openmimo.model.moe import DenseMLP, LayerRouting, SparseMLP


class RMSNorm(HasInvariantForm, nn.Module):
    """Scale to unit mean square in fp32, return to the input dtype, then multiply by the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if kernels.usable(x) and self.weight.dtype is x.dtype and not self.invariant:
            return kernels.rms_norm(x, self.weight, self.eps)
        return rms_normalize(x, self.eps, is_invariant=self.invariant) * self.weight

    def after_adding(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y and its norm."""
        if kernels.usable(x) and self.weight.dtype is x.dtype is y.dtype and not self.invariant:
            return kernels.add_rms_norm(x, y, self.weight, self.eps)
        total = x + y
        return total, self(total)


def rms_normalize(x: Tensor, eps: float, *, is_invariant: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dim, computed in fp32, returned in x's dtype."""
    return _RMSNormalize.apply(x, eps, is_invariant)  # type: ignore[no-any-return]


class _RMSNormalize(torch.autograd.Function):
    """Written out because a norm is pure memory traffic: this form makes half the passes that autograd would.

    With y = x r and r = (mean(x^2) + eps)^-1/2:  dx = r (dy - y mean(dy * y)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, is_invariant: bool) -> Tensor:
        if is_invariant:
            scale = 1.0 / torch.sqrt(invariant.mean_square(x) + eps)
        else:
            mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
            scale = torch.rsqrt(mean_square + eps)
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        y, scale = ctx.saved_tensors
        projection = (grad * y).sum(-1, keepdim=True, dtype=torch.float32) / y.shape[-1]
        return ((grad - y * projection) * scale).to(y.dtype), None, None


class Block(nn.Module):
    """Pre-norm attention, then a dense or sparse feed-forward."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, config.layer_kinds[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: SparseMLP | DenseMLP
        if config.layer_is_moe[index]:
            assert config.moe is not None
            self.mlp = SparseMLP(config.hidden_size, config.moe)
        else:
            self.mlp = DenseMLP(config.hidden_size, config.dense_dim)

    def forward(
        self, x_BTD: Tensor, plan: AttentionPlan, cache: LayerCache | None = None, replay_BTk: Tensor | None = None
    ) -> tuple[Tensor, LayerRouting | None]:
        """Shapes: x (B, T, D) -> (B, T, D); the routing is None for a dense layer."""
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), plan, cache)
        x_BTD, normed_BTD = self.post_attention_layernorm.after_adding(x_BTD, attended_BTD)
        if isinstance(self.mlp, DenseMLP):
            return x_BTD + self.mlp(normed_BTD), None
        y_BTD, routing = self.mlp(normed_BTD, replay_BTk, static=plan.static)
        return x_BTD + y_BTD, routing
