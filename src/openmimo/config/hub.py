"""The Hub's `config.json` (the layout of the published remote code) to and from `ModelConfig`.

`sliding_window` is the number of keys that a query sees, its own included, as in the remote code; engines that count
one key more do so on their own. Rotary dimensions are `head_dim * partial_rotary_factor`, rounded down to even.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openmimo.config.fields import (
    FIXED_EVERYWHERE,
    IGNORED_EVERYWHERE,
    Fields,
    Fixed,
    Json,
    kept_keys,
    read_moe,
    show,
)
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig
from openmimo.config.quantization import KEY as QUANTIZATION
from openmimo.config.quantization import Fp8Quantization, read_quantization
from openmimo.errors import ConfigError, nearest

Layout = Literal["hub", "native"]

IGNORED: dict[str, str] = IGNORED_EVERYWHERE

FIXED: dict[str, Fixed] = {
    **FIXED_EVERYWHERE,
    "n_shared_experts": Fixed((None, 0), "the architecture has no shared expert"),
    "rope_scaling": Fixed((None,), "rotary frequencies are not rescaled"),
    "scoring_func": Fixed(("sigmoid",), "expert scores are independent of each other"),
    "topk_method": Fixed(("noaux_tc",), "experts are balanced by a bias on the choice"),
    "hybrid_block_size": Fixed((None,), "hybrid_layer_pattern says which layers slide", written=False),
    "moe_router_dtype": Fixed(("float32", None), "a router in a shorter format chooses other experts", written=False),
}

# The published configuration does not say how many MTP heads its files hold; they hold three.
PUBLISHED_MTP_HEADS = 3

_KINDS = {0: AttentionKind.GLOBAL, 1: AttentionKind.SLIDING}
_KIND_CODES = {kind: code for code, kind in _KINDS.items()}
_SPARSE = {0: False, 1: True}


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A whole `config.json`: the model, the number format of its weights, and the rest.

    `kept` has the ignored keys, and other keys that the file spells in another way than we would.
    """

    layout: Layout
    model: ModelConfig
    quantization: Fp8Quantization | None = None
    kept: Mapping[str, object] = field(default_factory=dict[str, object])


def from_hub(data: Mapping[str, object]) -> ModelConfig:
    """The model that the Hub keys describe. Raises: ConfigError."""
    return read_hub(data).model


def to_hub(config: ModelConfig, *, quantized: bool = False, extra: Mapping[str, object] | None = None) -> Json:
    """Hub keys for a model; `from_hub` gives an equal model back.

    `quantized` adds the FP8 format of the published checkpoint, `extra` any of the `IGNORED` keys.
    Raises: ConfigError for another key in `extra`.
    """
    check_extra(extra or {}, IGNORED)
    return {**_written(config, Fp8Quantization.of_model(config) if quantized else None), **(extra or {})}


def read_hub(data: Mapping[str, object]) -> ConfigFile:
    """Everything a Hub `config.json` says. Raises: ConfigError."""
    fields = Fields(data)
    fields.fixed(FIXED)
    model = _read_model(fields)
    quantization = read_quantization(fields)
    fields.finish(IGNORED)
    kept = kept_keys(data, _written(model, quantization))
    return ConfigFile(layout="hub", model=model, quantization=quantization, kept=kept)


def write_hub(file: ConfigFile) -> Json:
    """The keys of a `ConfigFile`, with every key that was read at its value."""
    written = _written(file.model, file.quantization)
    merged = {**written, **file.kept}
    again = read_hub(merged)
    if (again.model, again.quantization) == (file.model, file.quantization):
        return merged
    # The model was changed after reading, so its old spellings no longer hold.
    return {**written, **{key: value for key, value in file.kept.items() if key in IGNORED}}


def check_extra(extra: Mapping[str, object], ignored: Mapping[str, str]) -> None:
    """Raises: ConfigError if a key in `extra` would change the model."""
    for key in extra:
        if key not in ignored:
            raise ConfigError(f"extra key {key!r} is not one of the ignored ones; {nearest(key, ignored)}")


def _read_model(fields: Fields) -> ModelConfig:
    num_layers = fields.whole("num_hidden_layers")
    is_moe = fields.choices("moe_layer_freq", num_layers, _SPARSE)
    heads = fields.optional_whole("num_nextn_predict_layers")
    bos, pad = fields.optional_whole("bos_token_id"), fields.optional_whole("pad_token_id")
    return ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        dense_dim=fields.whole("intermediate_size"),
        layer_kinds=fields.choices("hybrid_layer_pattern", num_layers, _KINDS),
        layer_is_moe=is_moe,
        global_attention=_read_attention(fields, "", sink="add_full_attention_sink_bias", window_keys=None),
        sliding_attention=_read_attention(
            fields, "swa_", sink="add_swa_attention_sink_bias", window_keys=_read_window(fields)
        ),
        moe=read_moe(fields, needed=any(is_moe), none=None),
        num_mtp_heads=PUBLISHED_MTP_HEADS if heads is None else heads,
        rope_fraction=fields.number("partial_rotary_factor"),
        value_scale=fields.nullable_number("attention_value_scale", 1.0),
        norm_eps=fields.number("layernorm_epsilon"),
        max_positions=fields.whole("max_position_embeddings"),
        init_std=fields.number("initializer_range"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=fields.token_ids("eos_token_id"),
        pad_token_id=pad,
        bos_token_id=bos,
    )


def _read_attention(fields: Fields, prefix: str, *, sink: str, window_keys: int | None) -> AttentionConfig:
    return AttentionConfig(
        num_heads=fields.whole(f"{prefix}num_attention_heads"),
        num_kv_heads=fields.whole(f"{prefix}num_key_value_heads"),
        qk_head_dim=fields.whole(f"{prefix}head_dim"),
        v_head_dim=fields.whole(f"{prefix}v_head_dim"),
        rope_theta=fields.number(f"{prefix}rope_theta"),
        sink=fields.flag(sink),
        window_keys=window_keys,
    )


def _read_window(fields: Fields) -> int:
    """The window, from either or both of the two keys that the published file has for it."""
    sizes = {key: fields.whole(key) for key in ("sliding_window", "sliding_window_size") if key in fields}
    if not sizes:
        return fields.whole("sliding_window")
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"sliding_window and sliding_window_size differ: {show(list(sizes.values()))}; make them equal"
        )
    return next(iter(sizes.values()))


def _written(config: ModelConfig, quantization: Fp8Quantization | None) -> Json:
    moe, eos = config.moe, config.eos_token_ids
    window = config.sliding_attention.window_keys
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        **{key: rule.allowed[0] for key, rule in FIXED.items() if rule.written},
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_dim,
        "num_hidden_layers": config.num_layers,
        "hybrid_layer_pattern": [_KIND_CODES[kind] for kind in config.layer_kinds],
        "moe_layer_freq": [int(is_moe) for is_moe in config.layer_is_moe],
        **_written_attention(config.global_attention, "", sink="add_full_attention_sink_bias"),
        **_written_attention(config.sliding_attention, "swa_", sink="add_swa_attention_sink_bias"),
        "sliding_window": window,
        "sliding_window_size": window,
        "partial_rotary_factor": config.rope_fraction,
        "attention_value_scale": config.value_scale,
        "n_routed_experts": moe.num_experts if moe else None,
        "num_experts_per_tok": moe.num_experts_per_token if moe else None,
        "moe_intermediate_size": moe.expert_dim if moe else None,
        "norm_topk_prob": moe.normalize_weights if moe else True,
        # The published file says null where it means 1.
        "routed_scaling_factor": moe.routed_scaling if moe and moe.routed_scaling != 1.0 else None,
        "num_nextn_predict_layers": config.num_mtp_heads,
        "layernorm_epsilon": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        **({QUANTIZATION: quantization.to_json()} if quantization else {}),
    }


def _written_attention(attention: AttentionConfig, prefix: str, *, sink: str) -> Json:
    return {
        f"{prefix}num_attention_heads": attention.num_heads,
        f"{prefix}num_key_value_heads": attention.num_kv_heads,
        f"{prefix}head_dim": attention.qk_head_dim,
        f"{prefix}v_head_dim": attention.v_head_dim,
        f"{prefix}rope_theta": attention.rope_theta,
        sink: attention.sink,
    }
