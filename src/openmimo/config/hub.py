"""The Hub's `config.json` (the layout of the published remote code) to and from `ModelConfig`.

`sliding_window` is the number of keys that a query sees, its own included, as in the remote code; engines that count
one key more do so on their own. Rotary dimensions are `head_dim * partial_rotary_factor`, rounded down to even.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

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
_NORM_EPS = "layernorm_epsilon"


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
    return merge_kept(file, _written(file.model, file.quantization), read_hub, IGNORED)


def merge_kept(file: ConfigFile, written: Json, read: Callable[[Json], ConfigFile], ignored: Mapping[str, str]) -> Json:
    """`written` with the spellings that the file kept, as far as they still say the same."""
    merged = {**written, **file.kept}
    again = read(merged)
    if (again.model, again.quantization) == (file.model, file.quantization):
        return merged
    # The model was changed after reading, so its old spellings no longer hold.
    return {**written, **{key: value for key, value in file.kept.items() if key in ignored}}


def check_extra(extra: Mapping[str, object], ignored: Mapping[str, str]) -> None:
    """Raises: ConfigError if a key in `extra` would change the model."""
    for key in extra:
        if key not in ignored:
            raise ConfigError(f"extra key {key!r} is not one of the ignored ones; {nearest(key, ignored)}")


def _read_model(fields: Fields) -> ModelConfig:
    num_layers = fields.whole("num_hidden_layers")
    return read_model(
        fields,
        layer_kinds=fields.choices("hybrid_layer_pattern", num_layers, _KINDS),
        layer_is_moe=fields.choices("moe_layer_freq", num_layers, _SPARSE),
        global_attention=_read_attention(fields, "", sink="add_full_attention_sink_bias", window_keys=None),
        sliding_attention=_read_attention(
            fields, "swa_", sink="add_swa_attention_sink_bias", window_keys=_read_window(fields)
        ),
        rope_fraction=fields.number("partial_rotary_factor"),
        norm_eps_key=_NORM_EPS,
        no_moe=None,
        default_mtp_heads=PUBLISHED_MTP_HEADS,
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
    moe, window = config.moe, config.sliding_attention.window_keys
    return {
        **write_model(config, norm_eps_key=_NORM_EPS, no_moe=None),
        **{key: rule.allowed[0] for key, rule in FIXED.items() if rule.written},
        "hybrid_layer_pattern": [_KIND_CODES[kind] for kind in config.layer_kinds],
        "moe_layer_freq": [int(is_moe) for is_moe in config.layer_is_moe],
        **_written_attention(config.global_attention, "", sink="add_full_attention_sink_bias"),
        **_written_attention(config.sliding_attention, "swa_", sink="add_swa_attention_sink_bias"),
        "sliding_window": window,
        "sliding_window_size": window,
        "partial_rotary_factor": config.rope_fraction,
        # The published file says null where it means 1.
        "routed_scaling_factor": moe.routed_scaling if moe and moe.routed_scaling != 1.0 else None,
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
