"""Configurations that exercise every key: odd values everywhere, so that a swapped or dropped key shows."""

from __future__ import annotations

import random
from typing import Any

from openmimo.config.hub import to_hub
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig, preset

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING

# What is known of the published file; `num_nextn_predict_layers` is absent there.
PUBLISHED: dict[str, Any] = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "auto_map": {"AutoConfig": "configuration_mimo_v2_flash.MiMoV2FlashConfig"},
    "vocab_size": 152576,
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "intermediate_size": 16384,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "layernorm_epsilon": 1e-5,
    "use_cache": True,
    "tie_word_embeddings": False,
    "rope_theta": 5000000,
    "swa_rope_theta": 10000,
    "partial_rotary_factor": 0.334,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_value_scale": 0.707,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "sliding_window": 128,
    "sliding_window_size": 128,
    "attention_chunk_size": 128,
    "hybrid_layer_pattern": [0 if i in (0, 5, 11, 17, 23, 29, 35, 41, 47) else 1 for i in range(48)],
    "moe_layer_freq": [0] + [1] * 47,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "ignored_layers": [
            *(f"model.layers.{i}.self_attn.o_proj" for i in range(48)),
            "model.decoder.self_attn.o_proj",
        ],
    },
}


def distinct_config(**changes: object) -> ModelConfig:
    """A model in which no two numbers of the same kind are equal."""
    config = ModelConfig(
        vocab_size=101,
        hidden_size=24,
        dense_dim=40,
        layer_kinds=(GLOBAL, SLIDING, SLIDING, GLOBAL),
        layer_is_moe=(False, True, False, True),
        global_attention=AttentionConfig(
            num_heads=6, num_kv_heads=3, qk_head_dim=10, v_head_dim=7, rope_theta=5e5, sink=False
        ),
        sliding_attention=AttentionConfig(
            num_heads=8, num_kv_heads=4, qk_head_dim=12, v_head_dim=9, rope_theta=123.0, sink=True, window_keys=5
        ),
        moe=MoEConfig(
            num_experts=11, num_experts_per_token=2, expert_dim=13, normalize_weights=False, routed_scaling=1.5
        ),
        num_mtp_heads=2,
        rope_fraction=0.45,
        value_scale=0.6,
        norm_eps=1e-6,
        max_positions=777,
        init_std=0.006,
        tie_embeddings=True,
        eos_token_ids=(99, 98),
        pad_token_id=97,
        bos_token_id=96,
    )
    return config.replace(**changes)


def random_config(rng: random.Random, *, native: bool = False) -> ModelConfig:
    """Any model; with `native` one that transformers can express."""

    def attention(kind: AttentionKind) -> AttentionConfig:
        kv_heads = rng.randint(1, 4)
        return AttentionConfig(
            num_heads=kv_heads * rng.choice((1, 2, 4)),
            num_kv_heads=kv_heads,
            qk_head_dim=rng.randint(1, 99),
            v_head_dim=rng.randint(1, 99),
            rope_theta=rng.choice((10_000, 5e6, rng.uniform(1, 1e7))),
            sink=rng.random() < 0.5,
            window_keys=rng.randint(1, 999) if kind is SLIDING else None,
        )

    layers = rng.randint(1, 9)
    moe = rng.random() < 0.7
    experts = rng.randint(2, 300)
    wide, slides = attention(GLOBAL), attention(SLIDING)
    fraction = rng.uniform(0, 1)
    if native:
        heads = {"num_heads": wide.num_kv_heads * 4, "qk_head_dim": rng.choice((16, 64, 192)), "v_head_dim": 8}
        wide = _with(wide, **heads, sink=False)
        slides = _with(slides, **heads, sink=True, num_kv_heads=wide.num_kv_heads * 2)
        fraction = rng.choice((0.0, 0.125, 0.5, 1.0))
    return ModelConfig(
        vocab_size=rng.randint(10, 10_000),
        hidden_size=rng.randint(1, 500),
        dense_dim=rng.randint(1, 500),
        layer_kinds=tuple(rng.choice((GLOBAL, SLIDING)) for _ in range(layers)),
        layer_is_moe=tuple(moe and rng.random() < 0.5 for _ in range(layers)),
        global_attention=wide,
        sliding_attention=slides,
        moe=MoEConfig(
            num_experts=experts,
            num_experts_per_token=rng.randint(1, experts),
            expert_dim=rng.randint(1, 500),
            normalize_weights=rng.random() < 0.5,
            routed_scaling=rng.choice((1.0, 0.0, 2.5)),
        )
        if moe
        else None,
        num_mtp_heads=rng.randint(0, 4),
        rope_fraction=fraction,
        value_scale=rng.choice((1.0, 0.707, rng.random())),
        norm_eps=rng.choice((1e-5, 1e-6)),
        max_positions=rng.randint(1, 10**6),
        init_std=rng.choice((0.02, 0.006)),
        tie_embeddings=rng.random() < 0.5,
        eos_token_ids=tuple(rng.randrange(10) for _ in range(rng.randint(0, 3))),
        pad_token_id=rng.choice((None, 3)),
        bos_token_id=rng.choice((None, 0)),
    )


def hub_sample() -> dict[str, Any]:
    """Hub keys of a small model, complete with ignored keys and a number format."""
    return to_hub(preset("nano"), quantized=True, extra={"torch_dtype": "bfloat16", "use_cache": True})


def _with(attention: AttentionConfig, **changes: Any) -> AttentionConfig:
    return AttentionConfig(**{**vars(attention), **changes})
