"""transformers' own `config.json` keys for `mimo_v2_flash` to and from `ModelConfig`. Follows transformers 5.23.

What its modelling code fixes, and a model must therefore have to be written in this layout:
- sliding layers have twice the key/value heads of global ones, and equal query heads and head sizes;
- sliding layers have sinks, global layers have none;
- the rotated part of a head is `int(head_dim * partial_rotary_factor)` and must be even.

Window: a query sees the keys with `key > query - sliding_window`, so `sliding_window` counts its own key, as our
`window_keys` does. A key `sliding_window_size`, left over from a Hub file, overrides it there with its value plus one,
and without either key the window is 129: transformers counts as SGLang does, one more than the Hub's own code.

A missing key has the value that transformers would give it. MTP heads are unknown to transformers: we write
`num_nextn_predict_layers`, which it carries along, and a file without the key describes a model without heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from openmimo.config.fields import (
    FIXED_EVERYWHERE,
    IGNORED_EVERYWHERE,
    Fields,
    Fixed,
    Json,
    kept_keys,
    read_model,
    show,
    write_model,
)
from openmimo.config.hub import FIXED as HUB_FIXED
from openmimo.config.hub import ConfigFile, check_extra, merge_kept, to_hub
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, hybrid_layer_kinds
from openmimo.config.quantization import KEY as QUANTIZATION
from openmimo.config.quantization import Fp8Quantization, read_quantization
from openmimo.errors import ConfigError

IGNORED: dict[str, str] = IGNORED_EVERYWHERE
FIXED: dict[str, Fixed] = FIXED_EVERYWHERE

DEFAULTS: Json = {
    "vocab_size": 152576,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "sliding_window": 129,
    "attention_value_scale": 0.707,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_routed_experts": 256,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}

# Hub keys that transformers carries along without reading them; they must not say anything else.
HUB_LEFTOVERS = (
    "hybrid_layer_pattern",
    "moe_layer_freq",
    "rope_theta",
    "swa_rope_theta",
    "partial_rotary_factor",
    "layernorm_epsilon",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "swa_v_head_dim",
    "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias",
)
_LEFTOVER_FIXED = {key: rule for key, rule in HUB_FIXED.items() if key not in FIXED}

_DEFAULT_ROPE_FRACTION = 0.334
_KINDS = {"full_attention": AttentionKind.GLOBAL, "sliding_attention": AttentionKind.SLIDING}
_KIND_NAMES = {kind: name for name, kind in _KINDS.items()}
_DEFAULT_THETAS = {AttentionKind.GLOBAL: 5e6, AttentionKind.SLIDING: 1e4}
_SPARSE = {"dense": False, "sparse": True}
_NORM_EPS = "rms_norm_eps"
# transformers takes no null here; without sparse layers it never looks.
_NO_MOE = 0


def from_native(data: Mapping[str, object]) -> ModelConfig:
    """The model that transformers would build. Raises: ConfigError."""
    return read_native(data).model


def to_native(config: ModelConfig, *, quantized: bool = False, extra: Mapping[str, object] | None = None) -> Json:
    """Native keys for a model, every one spelled out; `from_native` gives an equal model back.

    `quantized` adds the FP8 format of the published checkpoint, `extra` any of the `IGNORED` keys.
    Raises: ConfigError for a model that transformers cannot express, or another key in `extra`.
    """
    check_extra(extra or {}, IGNORED)
    _check_expressible(config)
    return {**_written(config, Fp8Quantization.of_model(config) if quantized else None), **(extra or {})}


def read_native(data: Mapping[str, object]) -> ConfigFile:
    """Everything a native `config.json` says. Raises: ConfigError."""
    fields = Fields({**DEFAULTS, **data})
    fields.fixed({**FIXED, **_LEFTOVER_FIXED})
    model = _read_model(fields)
    _check_expressible(model)
    _check_leftovers(fields, model)
    quantization = read_quantization(fields)
    fields.finish(IGNORED)
    kept = kept_keys(data, _written(model, quantization))
    return ConfigFile(layout="native", model=model, quantization=quantization, kept=kept)


def write_native(file: ConfigFile) -> Json:
    """The keys of a `ConfigFile`, with every key that was read at its value."""
    _check_expressible(file.model)
    return merge_kept(file, _written(file.model, file.quantization), read_native, IGNORED)


def _read_model(fields: Fields) -> ModelConfig:
    num_layers = fields.whole("num_hidden_layers")
    kinds = hybrid_layer_kinds(num_layers)
    if fields.optional("layer_types") is not None:
        kinds = fields.choices("layer_types", num_layers, _KINDS)
    is_moe = (False,) + (True,) * (num_layers - 1)
    if fields.optional("mlp_layer_types") is not None:
        is_moe = fields.choices("mlp_layer_types", num_layers, _SPARSE)
    thetas, rope_fraction = _read_rope(fields, kinds)
    return read_model(
        fields,
        layer_kinds=kinds,
        layer_is_moe=is_moe,
        global_attention=_read_attention(fields, AttentionKind.GLOBAL, thetas),
        sliding_attention=_read_attention(fields, AttentionKind.SLIDING, thetas),
        rope_fraction=rope_fraction,
        norm_eps_key=_NORM_EPS,
        no_moe=_NO_MOE,
        default_mtp_heads=0,
    )


def _read_attention(fields: Fields, kind: AttentionKind, thetas: Mapping[AttentionKind, float]) -> AttentionConfig:
    slides = kind is AttentionKind.SLIDING
    window, size = fields.whole("sliding_window"), fields.optional_whole("sliding_window_size", low=1)
    window = window if size is None else size + 1
    return AttentionConfig(
        num_heads=fields.whole("num_attention_heads"),
        num_kv_heads=fields.whole("num_key_value_heads") * (2 if slides else 1),
        qk_head_dim=fields.whole("head_dim"),
        v_head_dim=fields.whole("v_head_dim"),
        rope_theta=thetas[kind],
        sink=slides,
        window_keys=window if slides else None,
    )


def _read_rope(fields: Fields, kinds: tuple[AttentionKind, ...]) -> tuple[dict[AttentionKind, float], float]:
    """Base of each kind's rotary frequencies, and the rotated fraction, which must be the same for both."""
    key = "rope_parameters"
    table = fields.optional_table(key)
    if table is None:
        return _DEFAULT_THETAS, _DEFAULT_ROPE_FRACTION
    rope = Fields(table, prefix=f"{key}.")
    thetas, fractions = dict(_DEFAULT_THETAS), set[float]()
    for kind, name in _KIND_NAMES.items():
        entry = rope.optional_table(name)
        if entry is None:
            if kind in kinds:
                raise ConfigError(f"{key}.{name} is missing but layers of that type exist; add it")
            continue
        parts = Fields(entry, prefix=f"{key}.{name}.")
        parts.fixed({"rope_type": Fixed(("default",), "rotary frequencies are not rescaled")})
        thetas[kind] = parts.number("rope_theta")
        has_fraction = "partial_rotary_factor" in parts
        fractions.add(parts.number("partial_rotary_factor") if has_fraction else _DEFAULT_ROPE_FRACTION)
        parts.finish({})
    rope.finish({})
    if len(fractions) > 1:
        raise ConfigError(f"{key} has different partial_rotary_factor values {sorted(fractions)}; make them equal")
    return thetas, fractions.pop() if fractions else _DEFAULT_ROPE_FRACTION


def _check_expressible(config: ModelConfig) -> None:
    """Raises: ConfigError with all the reasons why transformers cannot express the model."""
    wide, slides = config.global_attention, config.sliding_attention
    rotated = {kind: int(config.attention(kind).qk_head_dim * config.rope_fraction) for kind in AttentionKind}
    reasons = [
        reason
        for failed, reason in (
            (
                slides.num_kv_heads != 2 * wide.num_kv_heads,
                f"sliding layers have {slides.num_kv_heads} key/value heads, not twice the {wide.num_kv_heads} of "
                "global layers",
            ),
            (slides.num_heads != wide.num_heads, "the two kinds of layers have different numbers of query heads"),
            (slides.qk_head_dim != wide.qk_head_dim, "the two kinds of layers have different QK head sizes"),
            (slides.v_head_dim != wide.v_head_dim, "the two kinds of layers have different V head sizes"),
            (not slides.sink, "sliding layers have no sink"),
            (wide.sink, "global layers have a sink"),
            (any(dims % 2 for dims in rotated.values()), f"{max(rotated.values())} rotary dimensions are odd"),
            (
                any(config.layer_is_moe) and config.moe is not None and config.moe.num_experts < 2,
                "its router needs two experts",
            ),
        )
        if failed
    ]
    if reasons:
        raise ConfigError(f"transformers cannot express this model: {'; '.join(reasons)}. Use the hub layout")


def _check_leftovers(fields: Fields, model: ModelConfig) -> None:
    expected = to_hub(model)
    for key in HUB_LEFTOVERS:
        if key in fields and fields.get(key) != expected[key]:
            raise ConfigError(
                f"{key}={show(fields.get(key))} contradicts the native keys, by which transformers goes; "
                f"they say {show(expected[key])}. Remove {key}"
            )


def _written(config: ModelConfig, quantization: Fp8Quantization | None) -> Json:
    attention, moe = config.global_attention, config.moe
    return {
        **write_model(config, norm_eps_key=_NORM_EPS, no_moe=_NO_MOE),
        **{key: rule.allowed[0] for key, rule in FIXED.items() if rule.written},
        "layer_types": [_KIND_NAMES[kind] for kind in config.layer_kinds],
        "mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in config.layer_is_moe],
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.qk_head_dim,
        "v_head_dim": attention.v_head_dim,
        "sliding_window": config.sliding_attention.window_keys,
        "rope_parameters": {
            name: {
                "rope_type": "default",
                "rope_theta": float(config.attention(kind).rope_theta),
                "partial_rotary_factor": float(config.rope_fraction),
            }
            for kind, name in _KIND_NAMES.items()
        },
        "routed_scaling_factor": float(moe.routed_scaling) if moe else 1.0,
        **({QUANTIZATION: quantization.to_json()} if quantization else {}),
    }
