"""A slow float64 twin of the architecture in numpy, one query, head and key at a time; it shares no code with src.

Also small configurations, and weights in which every parameter matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.model import MiMoModel

Array = np.ndarray
GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


def geometry(**changes: object) -> AttentionConfig:
    values: dict[str, object] = {
        "num_heads": 6,
        "num_kv_heads": 2,
        "qk_head_dim": 12,
        "v_head_dim": 8,
        "rope_theta": 5e6,
        "sink": False,
        "window_keys": None,
    }
    return AttentionConfig(**(values | changes))  # type: ignore[arg-type]


def small_config(*, window_keys: int = 5, sliding: dict[str, object] | None = None, **changes: object) -> ModelConfig:
    """Four layers, both kinds, dense and sparse; V differs from QK and sliding layers have other KV heads."""
    local = {"num_kv_heads": 3, "rope_theta": 100.0, "sink": True, "window_keys": window_keys} | (sliding or {})
    values: dict[str, object] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "dense_dim": 24,
        "layer_kinds": (GLOBAL, SLIDING, SLIDING, GLOBAL),
        "layer_is_moe": (False, True, True, True),
        "global_attention": geometry(),
        "sliding_attention": geometry(**local),
        "moe": MoEConfig(num_experts=5, num_experts_per_token=2, expert_dim=8),
        "num_mtp_heads": 3,
        "rope_fraction": 0.5,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def random_model(config: ModelConfig, seed: int = 0) -> MiMoModel:
    """Weights of unit gain; norms, sinks and router biases far from their initial values."""
    model = MiMoModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 1 and not name.endswith("sink_bias"):
                parameter.mul_(0.3).add_(1.0)
        for router in model.routers():
            router.e_score_correction_bias.normal_(std=0.3, generator=generator)
    return model


def random_tokens(config: ModelConfig, batch: int, num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class OracleOutput:
    hidden_TD: Array
    logits_TV: Array
    experts: list[list[set[int]]]


class Oracle:
    """Reads a model's weights once and computes single sequences in float64."""

    def __init__(self, model: MiMoModel) -> None:
        self.config = model.config
        self.weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}

    def forward(self, tokens: Sequence[int], positions: Sequence[int], documents: Sequence[int]) -> OracleOutput:
        x_TD = self.weights["embed_tokens.weight"][list(tokens)]
        routes: list[list[set[int]]] = []
        for index, kind in enumerate(self.config.layer_kinds):
            prefix = f"layers.{index}."
            normed = self.norm(x_TD, prefix + "input_layernorm")
            x_TD = x_TD + self.attention(normed, prefix + "self_attn.", kind, positions, documents)
            normed = self.norm(x_TD, prefix + "post_attention_layernorm")
            if self.config.layer_is_moe[index]:
                y_TD, chosen = self.sparse(normed, prefix + "mlp.")
                routes.append(chosen)
            else:
                y_TD = self.dense(normed, prefix + "mlp.")
            x_TD = x_TD + y_TD
        logits = self.norm(x_TD, "norm") @ self.weights["lm_head.weight"].T
        return OracleOutput(x_TD, logits, routes)

    def mtp_logits(
        self,
        head: int,
        hidden_TD: Array,
        tokens: Sequence[int],
        positions: Sequence[int],
        documents: Sequence[int],
        *,
        post_norm: bool = False,
        swap: bool = False,
        shift: int | None = None,
    ) -> Array:
        """Head `head` as published; the keyword arguments plant the known faults. Positions without a token see 0."""
        prefix, offset = f"mtp_heads.{head}.", head + 1 if shift is None else shift
        following = [tokens[i + offset] if i + offset < len(tokens) else 0 for i in range(len(tokens))]
        embedding = self.norm(self.weights["embed_tokens.weight"][following], prefix + "enorm")
        hidden = self.norm(self.norm(hidden_TD, "norm") if post_norm else hidden_TD, prefix + "hnorm")
        joined = np.concatenate((hidden, embedding) if swap else (embedding, hidden), axis=1)
        x_TD = joined @ self.weights[prefix + "eh_proj.weight"].T
        normed = self.norm(x_TD, prefix + "input_layernorm")
        x_TD = x_TD + self.attention(normed, prefix + "self_attn.", SLIDING, positions, documents)
        x_TD = x_TD + self.dense(self.norm(x_TD, prefix + "pre_mlp_layernorm"), prefix + "mlp.")
        return self.norm(x_TD, prefix + "final_layernorm") @ self.weights["lm_head.weight"].T

    def norm(self, x_TD: Array, name: str) -> Array:
        rows = [row / math.sqrt(float(np.mean(row * row)) + self.config.norm_eps) for row in x_TD]
        return np.stack(rows) * self.weights[name + ".weight"]

    def dense(self, x_TD: Array, prefix: str) -> Array:
        return swiglu(x_TD, self.weights[prefix + "gate_up_proj.weight"], self.weights[prefix + "down_proj.weight"])

    def sparse(self, x_TD: Array, prefix: str) -> tuple[Array, list[set[int]]]:
        """Token by token, expert by expert."""
        moe = self.config.moe
        assert moe is not None
        bias = self.weights[prefix + "gate.e_score_correction_bias"]
        rows: list[Array] = []
        chosen: list[set[int]] = []
        for x_D in x_TD:
            scores = 1.0 / (1.0 + np.exp(-(self.weights[prefix + "gate.weight"] @ x_D)))
            best = sorted(range(moe.num_experts), key=lambda e: -(scores[e] + bias[e]))[: moe.num_experts_per_token]
            total = sum(scores[e] for e in best) if moe.normalize_weights else 1.0
            y_D = np.zeros_like(x_D)
            for e in best:
                gate_up, down = (self.weights[f"{prefix}experts.{name}_proj"][e] for name in ("gate_up", "down"))
                y_D = y_D + moe.routed_scaling * scores[e] / total * swiglu(x_D[None], gate_up, down)[0]
            rows.append(y_D)
            chosen.append(set(best))
        return np.stack(rows), chosen

    def attention(
        self, x_TD: Array, prefix: str, kind: AttentionKind, positions: Sequence[int], documents: Sequence[int]
    ) -> Array:
        g = self.config.attention(kind)
        rotary = int(g.qk_head_dim * self.config.rope_fraction) // 2 * 2
        q_rows, k_rows, v_rows = np.split(
            self.weights[prefix + "qkv_proj.weight"],
            np.cumsum([g.num_heads * g.qk_head_dim, g.num_kv_heads * g.qk_head_dim]),
        )
        num_tokens = len(x_TD)
        q = (x_TD @ q_rows.T).reshape(num_tokens, g.num_heads, g.qk_head_dim)
        k = (x_TD @ k_rows.T).reshape(num_tokens, g.num_kv_heads, g.qk_head_dim)
        v = (x_TD @ v_rows.T).reshape(num_tokens, g.num_kv_heads, g.v_head_dim) * self.config.value_scale
        sink = self.weights.get(prefix + "attention_sink_bias")
        out = np.zeros((num_tokens, g.num_heads, g.v_head_dim))
        for i in range(num_tokens):
            q[i] = [rotate(vector, positions[i], rotary, g.rope_theta) for vector in q[i]]
            k[i] = [rotate(vector, positions[i], rotary, g.rope_theta) for vector in k[i]]
            for head in range(g.num_heads):
                group = head // (g.num_heads // g.num_kv_heads)
                total = math.exp(sink[head]) if sink is not None else 0.0
                for j in range(i + 1):
                    if documents[j] != documents[i] or (g.window_keys is not None and i - j >= g.window_keys):
                        continue
                    weight = math.exp(float(q[i, head] @ k[j, group]) / math.sqrt(g.qk_head_dim))
                    total += weight
                    out[i, head] += weight * v[j, group]
                out[i, head] /= total
        return out.reshape(num_tokens, -1) @ self.weights[prefix + "o_proj.weight"].T


def rotate(vector: Array, position: int, rotary: int, theta: float) -> Array:
    result, half = vector.copy(), rotary // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / rotary)
        a, b = vector[i], vector[i + half]
        result[i] = a * math.cos(angle) - b * math.sin(angle)
        result[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return result


def swiglu(x_TD: Array, gate_up: Array, down: Array) -> Array:
    gate, up = np.split(gate_up, 2)
    activated = x_TD @ gate.T
    return (activated / (1.0 + np.exp(-activated)) * (x_TD @ up.T)) @ down.T
