"""Multi-token-prediction heads: light layers that draft the tokens after the next one.

Head k at position i sees the main model's hidden state h_i *before* the final norm and the embedding of
token i + 1 + k, keeps rotary position i, and predicts token i + 2 + k. Heads are not chained: each gets the same h.
Source: MiMo-V2-Flash report, section on MTP. Suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.model.attention import Attention, AttentionPlan
from openmimo.model.block import RMSNorm
from openmimo.model.cache import LayerCache
from openmimo.model.linear import Linear
from openmimo.model.moe import DenseMLP


class MTPHead(nn.Module):
    """Project [embedding, hidden] to the model width, then one sliding-window layer with a dense feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.norm_eps
        self.enorm = RMSNorm(dim, eps)
        self.hnorm = RMSNorm(dim, eps)
        self.eh_proj = Linear(2 * dim, dim)
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn = Attention(config, AttentionKind.SLIDING)
        self.pre_mlp_layernorm = RMSNorm(dim, eps)
        self.mlp = DenseMLP(dim, config.dense_dim)
        self.final_layernorm = RMSNorm(dim, eps)

    def forward(
        self, hidden_BTD: Tensor, embedding_BTD: Tensor, plan: AttentionPlan, cache: LayerCache | None = None
    ) -> Tensor:
        """Shapes: two of (B, T, D) -> (B, T, D), ready for the shared output head (the main norm is not applied)."""
        x_BTD = self.eh_proj(torch.cat((self.enorm(embedding_BTD), self.hnorm(hidden_BTD)), dim=-1))
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), plan, cache)
        x_BTD, normed_BTD = self.pre_mlp_layernorm.after_adding(x_BTD, attended_BTD)
        return self.final_layernorm.after_adding(x_BTD, self.mlp(normed_BTD))[1]
