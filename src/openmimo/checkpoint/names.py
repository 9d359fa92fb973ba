"""Hub tensor names and shapes against ours: the only place that knows both.

Files hold q, k, v, gate, up and every expert apart; the model stacks them. Files in the transformers-native layout
use the same tensor names (its writer reverses its own renames); its in-memory names are accepted when reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.config.tensor_names import MTP_PREFIX

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True, kw_only=True)
class HubTensor:
    """One tensor of a checkpoint and its place in the model's state dict.

    `rows` is a range of rows of `target` (of its `expert` where that is given). `alias` is the transformers in-memory
    name, whose tensor has the layout of `target`. `fp8` says whether FP8 checkpoints quantise it, `fp32` whether it
    stays in fp32 always. `pair` is, for K and V of a global layer, the name of the other one.
    """

    name: str
    target: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    expert: int | None = None
    alias: str | None = None
    alias_shape: tuple[int, ...] = ()
    fp8: bool = False
    fp32: bool = False
    pair: str | None = None

    @property
    def is_mtp(self) -> bool:
        return self.name.startswith(MTP_PREFIX)

    @property
    def is_key(self) -> bool:
        return self.name.endswith(".k_proj.weight")

    def of(self, target: Tensor) -> Tensor:
        """The view of the model's tensor that this checkpoint tensor fills."""
        part = target if self.expert is None else target[self.expert]
        return part if self.rows is None else part[self.rows[0] : self.rows[1]]


def hub_tensors(config: ModelConfig) -> Iterator[HubTensor]:
    """Every weight of a checkpoint, in layer order and without FP8 scales.

    Lazy, so that a configuration that claims a billion layers costs nothing until somebody asks for them.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    yield HubTensor(name="model.embed_tokens.weight", target="embed_tokens.weight", shape=vocabulary)
    for layer in range(config.num_layers):
        yield from _main_layer(config, layer)
    yield _norm(config, "model.norm", "norm")
    if not config.tie_embeddings:
        yield HubTensor(name="lm_head.weight", target="lm_head.weight", shape=vocabulary)
    for head in range(config.num_mtp_heads):
        yield from _mtp_head(config, head)


def pair_of(config: ModelConfig, tensor: HubTensor) -> HubTensor:
    """The V of a global layer's K, and the other way round."""
    prefixes = (name.rsplit(".", 2)[0] for name in (tensor.name, tensor.target))
    return next(other for other in _attention(config, AttentionKind.GLOBAL, *prefixes) if other.name == tensor.pair)


def _main_layer(config: ModelConfig, layer: int) -> Iterator[HubTensor]:
    hub, ours = f"model.layers.{layer}", f"layers.{layer}"
    yield _norm(config, f"{hub}.input_layernorm", f"{ours}.input_layernorm")
    yield from _attention(config, config.layer_kinds[layer], f"{hub}.self_attn", f"{ours}.self_attn")
    yield _norm(config, f"{hub}.post_attention_layernorm", f"{ours}.post_attention_layernorm")
    if config.layer_is_moe[layer]:
        yield from _sparse_mlp(config, f"{hub}.mlp", f"{ours}.mlp")
    else:
        yield from _dense_mlp(config, f"{hub}.mlp", f"{ours}.mlp")


def _mtp_head(config: ModelConfig, head: int) -> Iterator[HubTensor]:
    hub, ours = f"{MTP_PREFIX}{head}", f"mtp_heads.{head}"
    for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
        yield _norm(config, f"{hub}.{name}", f"{ours}.{name}")
    shape = (config.hidden_size, 2 * config.hidden_size)
    yield HubTensor(name=f"{hub}.eh_proj.weight", target=f"{ours}.eh_proj.weight", shape=shape)
    yield from _attention(config, AttentionKind.SLIDING, f"{hub}.self_attn", f"{ours}.self_attn")
    yield from _dense_mlp(config, f"{hub}.mlp", f"{ours}.mlp")


def _norm(config: ModelConfig, hub: str, ours: str) -> HubTensor:
    return HubTensor(name=f"{hub}.weight", target=f"{ours}.weight", shape=(config.hidden_size,))


def _attention(config: ModelConfig, kind: AttentionKind, hub: str, ours: str) -> Iterator[HubTensor]:
    attention = config.attention(kind)
    sizes = {
        "q": attention.num_heads * attention.qk_head_dim,
        "k": attention.num_kv_heads * attention.qk_head_dim,
        "v": attention.num_kv_heads * attention.v_head_dim,
    }
    partners = {"k": f"{hub}.v_proj.weight", "v": f"{hub}.k_proj.weight"} if kind is AttentionKind.GLOBAL else {}
    start = 0
    for part, size in sizes.items():
        yield HubTensor(
            name=f"{hub}.{part}_proj.weight",
            target=f"{ours}.qkv_proj.weight",
            shape=(size, config.hidden_size),
            rows=(start, start + size),
            fp8=True,
            pair=partners.get(part),
        )
        start += size
    shape = (config.hidden_size, attention.num_heads * attention.v_head_dim)
    yield HubTensor(name=f"{hub}.o_proj.weight", target=f"{ours}.o_proj.weight", shape=shape)
    if attention.sink:
        yield HubTensor(
            name=f"{hub}.attention_sink_bias",
            target=f"{ours}.attention_sink_bias",
            shape=(attention.num_heads,),
            alias=f"{hub}.sinks",
            alias_shape=(attention.num_heads,),
        )


def _dense_mlp(config: ModelConfig, hub: str, ours: str) -> Iterator[HubTensor]:
    dim, width = config.hidden_size, config.dense_dim
    for part, rows in (("gate", (0, width)), ("up", (width, 2 * width))):
        target = f"{ours}.gate_up_proj.weight"
        yield HubTensor(name=f"{hub}.{part}_proj.weight", target=target, shape=(width, dim), rows=rows, fp8=True)
    target = f"{ours}.down_proj.weight"
    yield HubTensor(name=f"{hub}.down_proj.weight", target=target, shape=(dim, width), fp8=True)


def _sparse_mlp(config: ModelConfig, hub: str, ours: str) -> Iterator[HubTensor]:
    assert config.moe is not None  # checked by ModelConfig
    experts, dim, width = config.moe.num_experts, config.hidden_size, config.moe.expert_dim
    yield HubTensor(name=f"{hub}.gate.weight", target=f"{ours}.gate.weight", shape=(experts, dim), fp32=True)
    bias = "gate.e_score_correction_bias"
    yield HubTensor(name=f"{hub}.{bias}", target=f"{ours}.{bias}", shape=(experts,), fp32=True)
    for expert in range(experts):
        parts = (
            ("gate", "gate_up", (0, width), (width, dim), (2 * width, dim)),
            ("up", "gate_up", (width, 2 * width), (width, dim), (2 * width, dim)),
            ("down", "down", None, (dim, width), (dim, width)),
        )
        for part, stacked, rows, shape, stacked_shape in parts:
            yield HubTensor(
                name=f"{hub}.experts.{expert}.{part}_proj.weight",
                target=f"{ours}.experts.{stacked}_proj",
                shape=shape,
                rows=rows,
                expert=expert,
                alias=f"{hub}.experts.{stacked}_proj",
                alias_shape=(experts, *stacked_shape),
                fp8=True,
            )
