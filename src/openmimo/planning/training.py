"""Training on a group of devices: bytes per device and the fastest that tokens can pass.

Layout: parameters, gradients and optimizer state are divided among all devices; a layer's weights are gathered for its
turn. Experts are divided among `expert_ranks` devices first, so that only tokens move between these.
"""

from __future__ import annotations

from dataclasses import dataclass

from openmimo.config.cost import count_parameters, training_flops
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig
from openmimo.errors import ConfigError
from openmimo.planning.devices import Fleet, rank_counts

# bf16 weights and gradients; fp32 masters and two moments.
WEIGHT_BYTES, GRADIENT_BYTES, STATE_BYTES = 2, 2, 12
BF16, FP32, INT64 = 2, 4, 8
# Rows of logits alive at once in the loss.
LOGIT_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes per device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A layout with its memory and the limit of its speed. `recompute` keeps layer inputs only."""

    expert_ranks: int
    recompute: bool
    memory: TrainingMemory
    tokens_per_second: float
    bound: str


def activation_bytes(config: ModelConfig, num_tokens: int, *, mtp_heads: int, recompute: bool = False) -> float:
    """What forward keeps for backward in bf16, for `num_tokens` tokens, and a chunk of logits.

    With `recompute`, layers and heads keep their input, and one layer at a time everything.
    """
    layers = [
        _attention_bytes(config, kind) + _feed_forward_bytes(config, sparse=sparse)
        for kind, sparse in zip(config.layer_kinds, config.layer_is_moe, strict=True)
    ]
    width = config.hidden_size * BF16
    # A head: an embedding, the two inputs joined, a sliding layer, its output, and the gradient that the loss keeps.
    head = _attention_bytes(config, AttentionKind.SLIDING) + _feed_forward_bytes(config, sparse=False) + 5 * width
    kept = sum(layers)
    if recompute:
        kept = len(layers) * width + max(*layers, head if mtp_heads else 0)
        head = 2 * width  # its embedding, and the loss's gradient
    last = 2 * width  # the last layer's output, and the gradient that the loss keeps
    logits = LOGIT_ROWS * config.vocab_size * (BF16 + FP32)
    table = (mtp_heads + 1) * config.vocab_size * config.hidden_size * FP32  # each loss sums the head's gradient
    return num_tokens * (kept + mtp_heads * head + last) + logits + table


def training_memory(
    config: ModelConfig,
    *,
    devices: int,
    expert_ranks: int,
    tokens_per_device: int,
    mtp_heads: int,
    recompute: bool = False,
) -> TrainingMemory:
    """Bytes on each of `devices`."""
    counts = count_parameters(config, mtp_heads=mtp_heads)
    per_device = counts.total / devices
    gathered = 0.0
    if devices > 1:
        # This layer's weights and the next one's, which are on their way; then the layer's gradients.
        shared = (counts.total - counts.experts - counts.embedding - counts.output_head) / config.num_layers
        experts = counts.experts / max(1, config.num_moe_layers) / expert_ranks if expert_ranks < devices else 0.0
        gathered = 3 * BF16 * max(shared + experts, counts.output_head)
    return TrainingMemory(
        weights=per_device * WEIGHT_BYTES,
        gradients=per_device * GRADIENT_BYTES,
        optimizer=per_device * STATE_BYTES,
        activations=activation_bytes(config, tokens_per_device, mtp_heads=mtp_heads, recompute=recompute),
        gathered=gathered,
    )


def plan_training(
    config: ModelConfig, fleet: Fleet, *, sequence_length: int, tokens_per_device: int, mtp_heads: int = 1
) -> TrainingPlan | None:
    """The fastest layout that fits, or None. Raises: ConfigError when a device gets less than one sequence."""
    if tokens_per_device < sequence_length:
        raise ConfigError(
            f"{tokens_per_device} tokens per device are less than one sequence of {sequence_length}; give more"
        )
    found: list[TrainingPlan] = []
    for expert_ranks in rank_counts(config, fleet.count):
        for recompute in (False, True):
            memory = training_memory(
                config,
                devices=fleet.count,
                expert_ranks=expert_ranks,
                tokens_per_device=tokens_per_device,
                mtp_heads=mtp_heads,
                recompute=recompute,
            )
            if memory.total <= fleet.device.memory:
                seconds, bound = _step_seconds(
                    config, fleet, expert_ranks, sequence_length, tokens_per_device, mtp_heads, recompute=recompute
                )
                rate = fleet.count * tokens_per_device / seconds
                found.append(
                    TrainingPlan(
                        expert_ranks=expert_ranks,
                        recompute=recompute,
                        memory=memory,
                        tokens_per_second=rate,
                        bound=bound,
                    )
                )
    return max(found, key=lambda plan: plan.tokens_per_second, default=None)


def devices_needed(config: ModelConfig, fleet: Fleet, *, tokens_per_device: int, mtp_heads: int = 1) -> int | None:
    """The fewest devices, in powers of two, on which one step fits with recomputation; None if more than 2^20."""
    for power in range(21):
        bigger = Fleet(device=fleet.device, count=1 << power)
        for expert_ranks in rank_counts(config, bigger.count):
            memory = training_memory(
                config,
                devices=bigger.count,
                expert_ranks=expert_ranks,
                tokens_per_device=tokens_per_device,
                mtp_heads=mtp_heads,
                recompute=True,
            )
            if memory.total <= fleet.device.memory:
                return bigger.count
    return None


def _step_seconds(
    config: ModelConfig,
    fleet: Fleet,
    expert_ranks: int,
    sequence_length: int,
    tokens: int,
    mtp_heads: int,
    *,
    recompute: bool,
) -> tuple[float, str]:
    """The longest of products, gathering and exchange, as if they overlapped; and which."""
    counts = count_parameters(config, mtp_heads=mtp_heads)
    passes = 4 / 3 if recompute else 1.0
    flops = tokens * training_flops(config, sequence_length, mtp_heads=mtp_heads) * passes
    # Weights twice, forward and backward, and gradients once.
    inside = (counts.total - counts.experts) * 3 * BF16 * (fleet.count - 1) / fleet.count
    copies = fleet.count // expert_ranks
    experts = counts.experts / expert_ranks * 3 * BF16 * (copies - 1) / copies
    exchanged = 0.0
    if config.moe is not None and expert_ranks > 1:
        reached = (expert_ranks - 1) * (1 - (1 - 1 / expert_ranks) ** config.moe.num_experts_per_token)
        # There and back, forward and backward.
        exchanged = 4 * BF16 * tokens * reached * config.hidden_size * config.num_moe_layers * passes
    parts = {
        "products": flops / fleet.device.peak("bf16"),
        "links": (inside + experts) / fleet.rate_between(fleet.count) + exchanged / fleet.rate_between(expert_ranks),
    }
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound], bound


def _attention_bytes(config: ModelConfig, kind: AttentionKind) -> float:
    """Per token: both norms' inputs and outputs, the joint projection, the result and its normaliser."""
    attention: AttentionConfig = config.attention(kind)
    kv = attention.num_kv_heads * (attention.qk_head_dim + attention.v_head_dim)
    projection = attention.num_heads * attention.qk_head_dim + kv
    result = attention.num_heads * attention.v_head_dim
    norms = 4 * config.hidden_size * BF16 + 2 * FP32
    return norms + (projection + result) * BF16 + attention.num_heads * FP32


def _feed_forward_bytes(config: ModelConfig, *, sparse: bool) -> float:
    """Per token: gate and up, and for a dense layer their product; a sparse one has its routing."""
    if not sparse or config.moe is None:
        return 3 * config.dense_dim * BF16
    moe = config.moe
    # Scores and their sum; experts, order, places and weights.
    routing = (moe.num_experts + 1) * FP32 + moe.num_experts_per_token * (3 * INT64 + FP32)
    return moe.num_experts_per_token * 2 * moe.expert_dim * BF16 + routing
