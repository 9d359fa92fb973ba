"""The shape of a MiMo-V2-Flash model: frozen dataclasses and the five presets.

Standard library only. File formats live in `hub.py` (Hub `config.json`) and `native.py`
(transformers); parameter, byte and FLOP formulas in `cost.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from openmimo.errors import ConfigError, nearest

# Upper limits that only a damaged file exceeds: sizes fit 32-bit indices, numbers fit fp32.
MAX_SIZE = 2**31 - 1
MAX_NUMBER = 3e38


class AttentionKind(str, Enum):
    """Which keys a layer's queries can see."""

    GLOBAL = "global"
    SLIDING = "sliding"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention geometry; a model has one for global and one for sliding layers.

    `num_heads` query heads share `num_kv_heads` key/value heads (the second divides the first).
    `sink` adds a learned per-head scalar to the softmax denominator.
    `window_keys` counts visible keys, the query's own included; None means all earlier keys.
    """

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    rope_theta: float
    sink: bool
    window_keys: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "qk_head_dim", "v_head_dim"):
            _positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; change one of them"
            )
        _finite("rope_theta", self.rope_theta, above_zero=True)
        if self.window_keys is not None:
            _positive("window_keys", self.window_keys)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sparse feed-forward layers: sigmoid router, top-k, no shared expert.

    `normalize_weights` divides the chosen experts' scores by their sum; `routed_scaling` then
    multiplies them.
    """

    num_experts: int
    num_experts_per_token: int
    expert_dim: int
    normalize_weights: bool = True
    routed_scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_experts_per_token", "expert_dim"):
            _positive(name, getattr(self, name))
        if self.num_experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_token={self.num_experts_per_token} exceeds num_experts={self.num_experts}"
            )
        _finite("routed_scaling", self.routed_scaling)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides the model's shapes and arithmetic.

    `layer_kinds` and `layer_is_moe` have one entry per main layer. MTP heads are extra: each is a
    sliding-window layer with a dense feed-forward of `dense_dim`. `rope_fraction` of the QK
    dimension is rotated, rounded down to an even number. `value_scale` multiplies V before the cache.
    """

    vocab_size: int
    hidden_size: int
    dense_dim: int
    layer_kinds: tuple[AttentionKind, ...]
    layer_is_moe: tuple[bool, ...]
    global_attention: AttentionConfig
    sliding_attention: AttentionConfig
    moe: MoEConfig | None
    num_mtp_heads: int = 3
    rope_fraction: float = 0.334
    value_scale: float = 0.707
    norm_eps: float = 1e-5
    max_positions: int = 262144
    init_std: float = 0.02
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "dense_dim", "max_positions"):
            _positive(name, getattr(self, name))
        if not self.layer_kinds:
            raise ConfigError("layer_kinds is empty; a model needs at least one layer")
        if len(self.layer_kinds) != len(self.layer_is_moe):
            raise ConfigError(
                f"layer_kinds has {len(self.layer_kinds)} entries but layer_is_moe has {len(self.layer_is_moe)}; "
                "give one of each per layer"
            )
        if any(self.layer_is_moe) and self.moe is None:
            raise ConfigError("layer_is_moe asks for sparse layers but moe is None; give a MoEConfig")
        if self.global_attention.window_keys is not None:
            raise ConfigError("global_attention.window_keys must be None; use a sliding layer for a window")
        if self.sliding_attention.window_keys is None:
            raise ConfigError("sliding_attention.window_keys is None; give the number of visible keys")
        _positive("num_mtp_heads", self.num_mtp_heads, low=0)
        _finite("rope_fraction", self.rope_fraction)
        _finite("value_scale", self.value_scale)
        for kind in AttentionKind:
            rotary = self.rotary_dim(kind)
            if self.rope_fraction < 0 or rotary > self.attention(kind).qk_head_dim:
                raise ConfigError(
                    f"rope_fraction={self.rope_fraction} gives {rotary} rotary dims of {kind.value} heads"
                )
        for name in ("norm_eps", "init_std"):
            _finite(name, getattr(self, name), above_zero=True)
        for token in (*self.eos_token_ids, self.pad_token_id, self.bos_token_id):
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(f"token id {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def num_moe_layers(self) -> int:
        return sum(self.layer_is_moe)

    def attention(self, kind: AttentionKind) -> AttentionConfig:
        return self.global_attention if kind is AttentionKind.GLOBAL else self.sliding_attention

    def rotary_dim(self, kind: AttentionKind) -> int:
        """How many leading dimensions of each QK head are rotated (even)."""
        dim = int(self.attention(kind).qk_head_dim * self.rope_fraction)
        return dim - dim % 2

    @classmethod
    def from_pretrained(cls, preset_or_folder: str | Path) -> ModelConfig:
        """The configuration of a preset or of a checkpoint folder in either layout. Raises: ConfigError."""
        from openmimo.config.io import read_model_config  # io reads files into this class

        return read_model_config(preset_or_folder)

    def replace(self, **changes: object) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def hybrid_layer_kinds(num_layers: int) -> tuple[AttentionKind, ...]:
    """The report's 5:1 pattern: layer 0 and every sixth layer are global, the rest slide."""
    return tuple(
        AttentionKind.GLOBAL if i == 0 or (i + 1) % 6 == 0 else AttentionKind.SLIDING for i in range(num_layers)
    )


def preset_names() -> tuple[str, ...]:
    """The names that `preset` knows."""
    return tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """One of the named models: nano, tiny, small, medium, flash. Raises: ConfigError for another name."""
    if name not in _PRESETS:
        raise ConfigError(f"no preset {name!r}; {nearest(name, _PRESETS)}")
    return _PRESETS[name]


def _positive(name: str, value: object, *, low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_SIZE:
        raise ConfigError(f"{name}={_short(value)} must be a whole number of at least {low} and at most {MAX_SIZE}")


def _finite(name: str, value: object, *, above_zero: bool = False) -> None:
    # `not <=`, because nan compares false with everything.
    if (
        isinstance(value, bool)
        or not isinstance(value, float | int)
        or not abs(value) <= MAX_NUMBER
        or (above_zero and value <= 0)
    ):
        expected = "a finite number above 0" if above_zero else "a finite number"
        raise ConfigError(f"{name}={_short(value)} must be {expected}")


def _short(value: object) -> str:
    # Very long integers cannot be turned into text.
    if isinstance(value, int) and value.bit_length() > 200:
        return "a very long number"
    return repr(value)


def _hybrid(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    dense_dim: int,
    num_experts: int,
    top_k: int,
    expert_dim: int,
    num_heads: int,
    kv_heads: tuple[int, int],
    head_dims: tuple[int, int],
    window_keys: int = 128,
    thetas: tuple[float, float] = (5e6, 1e4),
    max_positions: int = 262144,
    eos_token_ids: tuple[int, ...] = (),
    rope_fraction: float = 0.334,
) -> ModelConfig:
    """A model of the report's pattern; `kv_heads` and `thetas` are (global, sliding), `head_dims` (QK, V)."""

    def attention(kv: int, theta: float, sink: bool, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=kv,
            qk_head_dim=head_dims[0],
            v_head_dim=head_dims[1],
            rope_theta=theta,
            sink=sink,
            window_keys=window,
        )

    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        dense_dim=dense_dim,
        layer_kinds=hybrid_layer_kinds(num_layers),
        layer_is_moe=(False,) + (True,) * (num_layers - 1),
        global_attention=attention(kv_heads[0], thetas[0], False, None),
        sliding_attention=attention(kv_heads[1], thetas[1], True, window_keys),
        moe=MoEConfig(num_experts=num_experts, num_experts_per_token=top_k, expert_dim=expert_dim),
        max_positions=max_positions,
        eos_token_ids=eos_token_ids,
        rope_fraction=rope_fraction,
    )


# fmt: off
_PRESETS: dict[str, ModelConfig] = {
    "flash": _hybrid(vocab_size=152576, hidden_size=4096, num_layers=48, dense_dim=16384, num_experts=256, top_k=8,
                     expert_dim=2048, num_heads=64, kv_heads=(4, 8), head_dims=(192, 128),
                     eos_token_ids=(151645, 151643)),
    "medium": _hybrid(vocab_size=65536, hidden_size=2048, num_layers=18, dense_dim=6144, num_experts=64, top_k=8,
                      expert_dim=512, num_heads=32, kv_heads=(4, 8), head_dims=(192, 128)),
    "small": _hybrid(vocab_size=32768, hidden_size=1024, num_layers=12, dense_dim=2048, num_experts=32, top_k=4,
                     expert_dim=512, num_heads=16, kv_heads=(2, 4), head_dims=(192, 128)),
    "tiny": _hybrid(vocab_size=4096, hidden_size=256, num_layers=12, dense_dim=512, num_experts=16, top_k=2,
                    expert_dim=128, num_heads=8, kv_heads=(2, 4), head_dims=(48, 32)),
    # Small enough to learn the demo's three domains from nothing in minutes on two cores.
    "nano": _hybrid(vocab_size=1024, hidden_size=128, num_layers=6, dense_dim=256, num_experts=8, top_k=2,
                    expert_dim=128, num_heads=4, kv_heads=(1, 2), head_dims=(32, 32), window_keys=64,
                    thetas=(1e5, 1e4), max_positions=4096, rope_fraction=0.5),
}
# fmt: on
