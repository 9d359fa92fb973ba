"""One transformer layer and the norm it uses. Suffixes: B batch, T tokens, D hidden, k chosen experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmimo.config.model import ModelConfig
from openmimo.model.attention import Attention, AttentionPlan
from openmimo.model.cache import LayerCache
from openmimo.model.moe import DenseMLP, LayerRouting, SparseMLP


class RMSNorm(nn.Module):
    """Scale to unit mean square in fp32, return to the input dtype, then multiply by the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


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
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), plan, cache)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, DenseMLP):
            return x_BTD + self.mlp(normed_BTD), None
        y_BTD, routing = self.mlp(normed_BTD, replay_BTk)
        return x_BTD + y_BTD, routing
