"""Typed access to a parsed `config.json`, and what both of its layouts share."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from openmimo.config.model import MAX_NUMBER, MAX_SIZE, AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.errors import ConfigError, nearest

Json = dict[str, Any]

_T = TypeVar("_T")

IGNORED_EVERYWHERE: dict[str, str] = {
    "architectures": "the class name in other libraries",
    "auto_map": "names Python files of the Hub's remote code",
    "torch_dtype": "each tensor's file entry has its dtype",
    "dtype": "each tensor's file entry has its dtype",
    "transformers_version": "the version that wrote the file",
    "_name_or_path": "where the file was downloaded from",
    "use_cache": "the caller decides whether there is a cache",
    "attention_chunk_size": "no implementation reads it",
    "output_attentions": "asked for per call",
    "output_hidden_states": "asked for per call",
    "output_router_logits": "asked for per call",
    "return_dict": "asked for per call",
    "id2label": "for classifiers",
    "label2id": "for classifiers",
    "problem_type": "for classifiers",
    "chunk_size_feed_forward": "splits a computation without changing its result",
    "is_encoder_decoder": "always false for this architecture",
}


@dataclass(frozen=True)
class Fixed:
    """A key that has one meaning here: allowed spellings (the first one is written) and why there is no other."""

    allowed: tuple[object, ...]
    why: str
    written: bool = True


FIXED_EVERYWHERE: dict[str, Fixed] = {
    "model_type": Fixed(
        ("mimo_v2_flash", "", None), "successors such as mimo_v2 store their attention weights differently"
    ),
    "hidden_act": Fixed(("silu",), "feed-forward layers are SwiGLU"),
    "attention_bias": Fixed((False,), "projections have no bias"),
    "attention_dropout": Fixed((0.0, 0), "there is no dropout"),
    "n_group": Fixed((1,), "the router chooses among all experts at once"),
    "topk_group": Fixed((1,), "the router chooses among all experts at once"),
    "n_shared_experts": Fixed((None, 0), "the architecture has no shared expert", written=False),
    "rope_scaling": Fixed((None,), "rotary frequencies are not rescaled", written=False),
}


class Fields:
    """Reads keys with a type and a range; remembers which were read, so that `finish` finds the others."""

    def __init__(self, data: Mapping[str, object], *, prefix: str = "") -> None:
        self._data = data
        self._prefix = prefix
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def get(self, key: str) -> object:
        """The value of a key, marked as read. Raises: ConfigError if it is missing."""
        self._seen.add(key)
        if key not in self._data:
            raise ConfigError(f"{self._prefix + key!r} is missing; add it, its value decides what the model computes")
        return self._data[key]

    def optional(self, key: str) -> object:
        """The value of a key, marked as read; None when it is null or missing."""
        self._seen.add(key)
        return self._data.get(key)

    def whole(self, key: str, *, low: int = 1) -> int:
        """A whole number of at least `low`."""
        return whole(self._prefix + key, self.get(key), low=low)

    def optional_whole(self, key: str, *, low: int = 0) -> int | None:
        """A whole number of at least `low`, or None when the key is null or missing."""
        return None if self.optional(key) is None else self.whole(key, low=low)

    def number(self, key: str) -> float:
        """A finite number; whole numbers are taken as well."""
        return number(self._prefix + key, self.get(key))

    def nullable_number(self, key: str, null: float) -> float:
        """A finite number, or `null` where the key, which must be there, is null."""
        return null if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """true or false; 0 and 1 are refused."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._prefix}{key}={show(value)} must be true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none when the key is null or missing."""
        value = self.optional(key)
        items = cast("list[object]", value) if isinstance(value, list) else [] if value is None else [value]
        return tuple(whole(self._prefix + key, item, low=0) for item in items)

    def choices(self, key: str, length: int, meaning: Mapping[Any, _T]) -> tuple[_T, ...]:
        """A list with one of the words (or numbers) of `meaning` per layer."""
        value = self.get(key)
        if not isinstance(value, list):
            raise ConfigError(f"{key}={show(value)} must be a list with one entry per layer")
        items = cast("list[Any]", value)
        if len(items) != length:
            raise ConfigError(f"{key} has {len(items)} entries but num_hidden_layers is {length}; make them agree")
        kind = type(next(iter(meaning)))
        for index, item in enumerate(items):
            if type(item) is not kind or item not in meaning:
                raise ConfigError(f"{key}[{index}]={show(item)} must be {' or '.join(map(repr, meaning))}")
        return tuple(meaning[item] for item in items)

    def optional_table(self, key: str) -> dict[str, object] | None:
        """A JSON object, or None when the key is null or missing."""
        value = self.optional(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self._prefix}{key}={show(value)} must be an object")
        return cast("dict[str, object] | None", value)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings; null means an empty one."""
        value = self.optional(key)
        items = cast("list[object]", value) if isinstance(value, list) else []
        if (value is not None and not isinstance(value, list)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{self._prefix}{key}={show(value)} must be a list of names")
        return tuple(cast("list[str]", items))

    def fixed(self, rules: Mapping[str, Fixed]) -> None:
        """Raises: ConfigError for a present key whose value is not one of those allowed."""
        for key, rule in rules.items():
            if key in self._data and not any(_same(self.get(key), allowed) for allowed in rule.allowed):
                got, expected = show(self._data[key]), json.dumps(rule.allowed[0])
                raise ConfigError(f"{self._prefix}{key}={got} is not supported, only {expected}: {rule.why}")

    def finish(self, ignored: Mapping[str, str]) -> None:
        """Raises: ConfigError for a key that nothing has read and that is not in `ignored`."""
        known = self._seen | ignored.keys()
        for key in self._data:
            if key not in known:
                hint = nearest(key, known)
                # The list of all keys would bury the message.
                hint = hint if hint.startswith("did you mean") else "no known key is like it"
                raise ConfigError(f"unknown key {show(self._prefix + key)}: {hint}; correct or remove it")


def read_model(
    fields: Fields,
    *,
    layer_kinds: tuple[AttentionKind, ...],
    layer_is_moe: tuple[bool, ...],
    global_attention: AttentionConfig,
    sliding_attention: AttentionConfig,
    rope_fraction: float,
    norm_eps_key: str,
    no_moe: int | None,
    default_mtp_heads: int,
) -> ModelConfig:
    """A model from the keys that both layouts spell alike and the parts that they spell differently.

    `no_moe` is what the sizes of sparse layers are (besides null) when there are none. Raises: ConfigError.
    """
    heads = fields.optional_whole("num_nextn_predict_layers")
    return ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        dense_dim=fields.whole("intermediate_size"),
        layer_kinds=layer_kinds,
        layer_is_moe=layer_is_moe,
        global_attention=global_attention,
        sliding_attention=sliding_attention,
        moe=_read_moe(fields, needed=any(layer_is_moe), none=no_moe),
        num_mtp_heads=default_mtp_heads if heads is None else heads,
        rope_fraction=rope_fraction,
        value_scale=fields.nullable_number("attention_value_scale", 1.0),
        norm_eps=fields.number(norm_eps_key),
        max_positions=fields.whole("max_position_embeddings"),
        init_std=fields.number("initializer_range"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        eos_token_ids=fields.token_ids("eos_token_id"),
        pad_token_id=fields.optional_whole("pad_token_id"),
        bos_token_id=fields.optional_whole("bos_token_id"),
    )


def write_model(config: ModelConfig, *, norm_eps_key: str, no_moe: int | None) -> Json:
    """The keys that both layouts spell alike."""
    moe, eos = config.moe, config.eos_token_ids
    return {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.dense_dim,
        "num_hidden_layers": config.num_layers,
        "n_routed_experts": moe.num_experts if moe else no_moe,
        "num_experts_per_tok": moe.num_experts_per_token if moe else no_moe,
        "moe_intermediate_size": moe.expert_dim if moe else no_moe,
        "norm_topk_prob": moe.normalize_weights if moe else True,
        "num_nextn_predict_layers": config.num_mtp_heads,
        "attention_value_scale": float(config.value_scale),
        norm_eps_key: float(config.norm_eps),
        "max_position_embeddings": config.max_positions,
        "initializer_range": float(config.init_std),
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
    }


def _read_moe(fields: Fields, *, needed: bool, none: int | None) -> MoEConfig | None:
    """The sparse layers' shape; the value `none` (or null) in all three sizes means that there are no such layers.

    Raises: ConfigError, also when sparse layers are `needed` and not described.
    """
    sizes = {key: fields.optional_whole(key) for key in ("n_routed_experts", "num_experts_per_tok")}
    sizes["moe_intermediate_size"] = fields.optional_whole("moe_intermediate_size")
    normalize = fields.flag("norm_topk_prob")
    # Null has always meant 1 here, never 0.
    scaling = 1.0 if fields.optional("routed_scaling_factor") is None else fields.number("routed_scaling_factor")
    if all(size in (None, none) for size in sizes.values()) and not needed:
        return None
    return MoEConfig(
        num_experts=fields.whole("n_routed_experts"),
        num_experts_per_token=fields.whole("num_experts_per_tok"),
        expert_dim=fields.whole("moe_intermediate_size"),
        normalize_weights=normalize,
        routed_scaling=scaling,
    )


def whole(key: str, value: object, *, low: int) -> int:
    """`value` as a whole number of at least `low`. Raises: ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key}={show(value)} must be a whole number")
    if not low <= value <= MAX_SIZE:
        raise ConfigError(f"{key}={show(value)} must be at least {low} and at most {MAX_SIZE}")
    return value


def number(key: str, value: object) -> float:
    """`value` as a finite number. Raises: ConfigError."""
    # `not <=`, because nan compares false with everything.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise ConfigError(f"{key}={show(value)} must be a finite number")
    return float(value)


def kept_keys(data: Mapping[str, object], written: Mapping[str, object]) -> dict[str, object]:
    """The part of a file that `written` would lose or change."""
    return {
        key: copy.deepcopy(value)
        for key, value in data.items()
        if key not in written or type(value) is not type(written[key]) or value != written[key]
    }


def show(value: object) -> str:
    """A value for an error text, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a very long number"
    text = repr(value) if not isinstance(value, list | dict) else _show_nested(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_nested(value: object) -> str:
    name = "a list" if isinstance(value, list) else "an object"
    return f"{name} of {len(cast('list[object]', value))} entries"


def _same(value: object, expected: object) -> bool:
    return type(value) is type(expected) and value == expected
