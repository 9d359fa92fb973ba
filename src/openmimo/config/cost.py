"""What a model costs: parameters, bytes, KV cache and FLOPs, from its configuration alone.

"Entries" are stored numbers, the router's balance bias included. A token's active entries are those it multiplies
with: everything but the experts that were not chosen for it. The embedding table counts as active only on request,
because a token reads a single row of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig
from openmimo.errors import ConfigError, nearest

WeightFormat = Literal["fp8", "bf16", "fp32"]
Component = Literal[
    "embedding", "output_head", "global_attention", "sliding_attention", "dense", "experts", "router", "norms", "mtp"
]

BLOCK = 128
_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Entries by component; `scales` are those of FP8 blocks. `mtp` has whole heads, their attention included."""

    embedding: int = 0
    output_head: int = 0
    global_attention: int = 0
    sliding_attention: int = 0
    dense: int = 0
    experts: int = 0
    router: int = 0
    norms: int = 0
    mtp: int = 0
    scales: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class KVCacheBytes:
    """Bytes of one sequence's keys and values by kind of layer."""

    global_layers: int
    sliding_layers: int
    mtp_heads: int

    @property
    def total(self) -> int:
        return self.global_layers + self.sliding_layers + self.mtp_heads


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Equal tensors: how many entries they store and a token uses, and how a checkpoint keeps them.

    `storage` is the shortest format; `matmul` says whether a token's entries are multiplied with an activation each.
    """

    component: Component
    entries: int
    active: int
    scales: int = 0
    storage: WeightFormat = "bf16"
    matmul: bool = True


def count_parameters(config: ModelConfig, *, mtp_heads: int | None = None, fp8_scales: bool = False) -> ParameterCount:
    """All entries; `mtp_heads` defaults to the configuration's. A tied embedding counts once, as `output_head`."""
    counts: dict[str, int] = {}
    for part in _parts(config, _heads(config, mtp_heads)):
        counts[part.component] = counts.get(part.component, 0) + part.entries
        if fp8_scales:
            counts["scales"] = counts.get("scales", 0) + part.scales
    return ParameterCount(**counts)


def count_active(config: ModelConfig, *, mtp_heads: int = 0, with_embedding: bool = False) -> ParameterCount:
    """Entries that one token uses in the main model and in `mtp_heads` heads."""
    counts: dict[str, int] = {}
    for part in _parts(config, _heads(config, mtp_heads)):
        if part.component != "embedding" or with_embedding:
            counts[part.component] = counts.get(part.component, 0) + part.active
    return ParameterCount(**counts)


def weight_bytes(config: ModelConfig, weights: WeightFormat = "bf16", *, mtp_heads: int | None = None) -> int:
    """Bytes of all tensors in a checkpoint.

    `fp8` keeps in bf16 what the published checkpoint does, and has fp32 scales; routers are fp32 in every format.
    Raises: ConfigError for another format.
    """
    if weights not in _BYTES:
        raise ConfigError(f"no weight format {weights!r}; {nearest(weights, _BYTES)}")
    total = 0
    for part in _parts(config, _heads(config, mtp_heads)):
        total += part.entries * max(_BYTES[weights], _BYTES[part.storage])
        total += part.scales * _SCALE_BYTES if weights == "fp8" else 0
    return total


def kv_cache_bytes(
    config: ModelConfig, length: int, bytes_per_value: int = 2, draft_slots: int = 0, *, mtp_heads: int = 0
) -> KVCacheBytes:
    """Bytes of keys and values after `length` tokens; sliding layers keep at most `window_keys` + `draft_slots`.

    Units: for one sequence. Pages and rings of an implementation may be rounded up from this.
    """
    _heads(config, mtp_heads)
    if length < 0 or bytes_per_value < 1 or draft_slots < 0:
        raise ConfigError(
            f"length={length} and draft_slots={draft_slots} must be 0 or more and bytes_per_value={bytes_per_value} "
            "at least 1"
        )

    def layer(attention: AttentionConfig) -> int:
        window = attention.window_keys
        tokens = length if window is None else min(length, window + draft_slots)
        values = attention.num_kv_heads * (attention.qk_head_dim + attention.v_head_dim)
        return tokens * values * bytes_per_value

    num_global = config.layer_kinds.count(AttentionKind.GLOBAL)
    sliding = layer(config.sliding_attention)
    return KVCacheBytes(
        global_layers=num_global * layer(config.global_attention),
        sliding_layers=(config.num_layers - num_global) * sliding,
        mtp_heads=mtp_heads * sliding,
    )


@dataclass(frozen=True, kw_only=True)
class WeightReads:
    """Bytes of matrices that one step reads: what every token uses, and the chosen experts."""

    shared: float
    experts: float


def step_weight_reads(
    config: ModelConfig, num_tokens: int, *, weight_bits: float = 16, mtp_heads: int = 0
) -> WeightReads:
    """Matrices that a step of `num_tokens` tokens reads, each once, and what `mtp_heads` heads read after it.

    Tokens choose experts as if at random, so a layer reads E (1 - (1 - k/E)^N) of them. Matrices have `weight_bits` per
    entry, scales included; the router is fp32; the few embedding rows and vectors are left out. A head needs the token
    that the head before it drew, so each reads the output head anew.
    """
    if num_tokens < 1:
        raise ConfigError(f"num_tokens={num_tokens} must be at least 1")
    shared = mtp_heads * config.vocab_size * config.hidden_size * weight_bits / 8
    experts = 0.0
    for part in _parts(config, _heads(config, mtp_heads)):
        if not part.matmul or not part.entries:
            continue
        num_bytes = part.entries * (32 if part.storage == "fp32" else weight_bits) / 8
        if part.component == "experts":
            experts += num_bytes * (1 - (1 - part.active / part.entries) ** num_tokens)
        else:
            shared += num_bytes
    return WeightReads(shared=shared, experts=experts)


def decode_step_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    context_tokens: int,
    weight_bits: float = 16,
    cache_bytes_per_value: int = 2,
) -> int:
    """Bytes that one decoding step must read: weights once for all sequences, and every sequence's keys and values."""
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    reads = step_weight_reads(config, batch_size, weight_bits=weight_bits)
    caches = batch_size * kv_cache_bytes(config, context_tokens, cache_bytes_per_value).total
    return round(reads.shared + reads.experts) + caches


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """FLOPs of a prompt whose last token alone gets logits."""
    without_head = _flops(config, 1, num_tokens, 0) - 2 * config.vocab_size * config.hidden_size
    return round(num_tokens * without_head) + 2 * config.vocab_size * config.hidden_size


def forward_flops(config: ModelConfig, context_tokens: int, *, mtp_heads: int = 0) -> int:
    """FLOPs of one token that sees `context_tokens` keys, its own included. A multiply-add is two."""
    return round(_flops(config, context_tokens, context_tokens, mtp_heads))


def training_flops(config: ModelConfig, sequence_length: int, *, mtp_heads: int = 0) -> int:
    """FLOPs per token of forward and backward (twice the forward), averaged over a sequence's positions."""
    return round(3 * _flops(config, 1, sequence_length, mtp_heads))


def _flops(config: ModelConfig, first: int, last: int, mtp_heads: int) -> float:
    """Mean over tokens that see `first` to `last` keys."""
    if first < 1 or last < first:
        raise ConfigError(f"got a context of {last} tokens; it must be at least 1, the token itself")
    head_entries = config.vocab_size * config.hidden_size
    parts = _parts(config, _heads(config, mtp_heads))
    # Every MTP head uses the output head once more.
    weights = sum(part.active for part in parts if part.matmul) + mtp_heads * head_entries
    attended = sum(
        _attention_flops(config.attention(kind), first, last)
        for kind in (*config.layer_kinds, *(AttentionKind.SLIDING,) * mtp_heads)
    )
    return 2 * weights + attended


def _attention_flops(attention: AttentionConfig, first: int, last: int) -> float:
    window = last if attention.window_keys is None else attention.window_keys
    # Sum over i of min(i, window), as whole numbers.
    growing = range(first, min(last, window) + 1)
    keys = (growing.start + growing.stop - 1) * len(growing) // 2 + (last - first + 1 - len(growing)) * window
    flops_per_key = 2 * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
    return flops_per_key * keys / (last - first + 1)


def _heads(config: ModelConfig, mtp_heads: int | None) -> int:
    heads = config.num_mtp_heads if mtp_heads is None else mtp_heads
    if heads < 0:
        raise ConfigError(f"mtp_heads={heads} must be 0 or more")
    return heads


def _parts(config: ModelConfig, mtp_heads: int) -> Iterator[_Part]:
    dim, moe = config.hidden_size, config.moe
    table = config.vocab_size * dim
    if not config.tie_embeddings:
        yield _Part(component="embedding", entries=table, active=table, matmul=False)
    yield _Part(component="output_head", entries=table, active=table)
    yield _plain("norms", (2 * config.num_layers + 1) * dim)
    for kind, component in _ATTENTION.items():
        count = config.layer_kinds.count(kind)
        yield from _attention_parts(config, kind, component, count)
    yield from _dense_parts(config, "dense", config.num_layers - config.num_moe_layers)
    if moe is not None:
        layers = config.num_moe_layers
        router = layers * moe.num_experts * dim
        yield _Part(component="router", entries=router, active=router, storage="fp32")
        yield _plain("router", layers * moe.num_experts, storage="fp32")
        one = 3 * layers * dim * moe.expert_dim
        yield _Part(
            component="experts",
            entries=one * moe.num_experts,
            active=one * moe.num_experts_per_token,
            scales=3 * layers * moe.num_experts * _blocks(dim) * _blocks(moe.expert_dim),
            storage="fp8",
        )
    projection = mtp_heads * 2 * dim * dim
    yield _Part(component="mtp", entries=projection, active=projection)
    yield _plain("mtp", mtp_heads * 5 * dim)
    yield from _attention_parts(config, AttentionKind.SLIDING, "mtp", mtp_heads)
    yield from _dense_parts(config, "mtp", mtp_heads)


def _attention_parts(config: ModelConfig, kind: AttentionKind, component: Component, count: int) -> Iterator[_Part]:
    attention, dim = config.attention(kind), config.hidden_size
    rows = _projection_rows(attention)
    qkv = count * sum(rows) * dim
    scale_rows = sum(_blocks(size) for size in rows)
    if kind is AttentionKind.GLOBAL and _has_rank_scales(attention):
        scale_rows += attention.num_kv_heads * _blocks(attention.qk_head_dim) - _blocks(rows[1])
        scale_rows += attention.num_kv_heads * _blocks(attention.v_head_dim) - _blocks(rows[2])
    yield _Part(component=component, entries=qkv, active=qkv, scales=count * scale_rows * _blocks(dim), storage="fp8")
    output = count * attention.num_heads * attention.v_head_dim * dim
    yield _Part(component=component, entries=output, active=output)
    if attention.sink:
        yield _plain(component, count * attention.num_heads)


def _projection_rows(attention: AttentionConfig) -> tuple[int, int, int]:
    return (
        attention.num_heads * attention.qk_head_dim,
        attention.num_kv_heads * attention.qk_head_dim,
        attention.num_kv_heads * attention.v_head_dim,
    )


def _has_rank_scales(attention: AttentionConfig) -> bool:
    """Whether global K and V are quantised head by head, as in the published checkpoint."""
    qk, v = attention.qk_head_dim, attention.v_head_dim
    q_rows = attention.num_heads // attention.num_kv_heads * qk
    return q_rows % BLOCK == 0 and _blocks(qk + v) == _blocks(qk) + _blocks(v)


def _dense_parts(config: ModelConfig, component: Component, count: int) -> Iterator[_Part]:
    entries = count * 3 * config.hidden_size * config.dense_dim
    scales = count * 3 * _blocks(config.hidden_size) * _blocks(config.dense_dim)
    yield _Part(component=component, entries=entries, active=entries, scales=scales, storage="fp8")


def _plain(component: Component, entries: int, *, storage: WeightFormat = "bf16") -> _Part:
    """Vectors: norms, sinks, biases."""
    return _Part(component=component, entries=entries, active=entries, storage=storage, matmul=False)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


_ATTENTION: dict[AttentionKind, Component] = {
    AttentionKind.GLOBAL: "global_attention",
    AttentionKind.SLIDING: "sliding_attention",
}
