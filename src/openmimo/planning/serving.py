"""Serving on a group of devices: bytes per device, and the fastest that steps can be.

A replica spans `ranks` devices. Its experts are divided among them; everything else is on each of them, and so is
every rank's part of the sequences. Times are limits: the longest of memory, products and links, as if they overlapped
perfectly, and what layers cost beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from openmimo.config.cost import (
    count_parameters,
    forward_flops,
    kv_cache_bytes,
    prefill_flops,
    step_weight_reads,
)
from openmimo.config.model import ModelConfig
from openmimo.errors import ConfigError, nearest
from openmimo.planning.devices import Fleet

# Bits per entry of a matrix, scales included, as the native runner packs them: FP8 has an fp32 scale per row and 128
# columns, int8 one per row, int4 one in bf16 per 32 columns.
WEIGHT_BITS = {"fp32": 32.0, "bf16": 16.0, "fp8": 8.25, "int8": 8.0, "int4": 4.5}
CACHE_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1}
# Of a device's memory that weights and caches may take; the rest is for activations and the runtime.
USABLE = 0.9
PAGE_TOKENS = 64
PANEL_OUTPUTS = 64  # the native runner packs matrices in panels of as many outputs; routers have fewer
STEP_TOKENS = 512
BF16_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The limit of one step of a replica, in seconds, and what sets it: memory, products or links."""

    seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What drafts are worth: decoding with them over decoding without, at a number of tokens per step."""

    batch: int
    acceptance_length: float
    speedup: float


class Replica:
    """One copy of a model on `ranks` devices of a fleet.

    Raises: ConfigError on a format that is not known, or more ranks than devices.
    """

    def __init__(
        self, config: ModelConfig, fleet: Fleet, *, ranks: int = 1, weights: str = "bf16", cache: str = "bf16"
    ) -> None:
        for word, known in ((weights, WEIGHT_BITS), (cache, CACHE_BYTES)):
            if word not in known:
                raise ConfigError(f"no number format {word!r}; {nearest(word, known)}")
        if not 1 <= ranks <= fleet.count:
            raise ConfigError(f"a replica on {ranks} devices does not fit {fleet.name}")
        self.config, self.fleet, self.ranks = config, fleet, ranks
        self.weights, self.cache = weights, cache
        self.weight_bits, self.cache_bytes = WEIGHT_BITS[weights], CACHE_BYTES[cache]

    def weight_bytes(self) -> float:
        """Per device. The embedding has at least 16 bits; norms and routers are fp32, routers in whole panels."""
        counts = count_parameters(self.config)
        experts = self.config.moe.num_experts if self.config.moe else 0
        padded = self.config.num_moe_layers * (-experts % PANEL_OUTPUTS) * self.config.hidden_size
        plain = counts.norms + counts.router + padded
        shared = counts.total - counts.embedding - counts.norms - counts.router - counts.experts
        bits = counts.embedding * max(self.weight_bits, 16) + plain * 32
        return (bits + (shared + counts.experts / self.ranks) * self.weight_bits) / 8

    def sequence_bytes(self, context_tokens: int) -> float:
        """The caches of one sequence, heads included; pages of global layers are whole."""
        pages = math.ceil(context_tokens / PAGE_TOKENS) * PAGE_TOKENS
        heads = self.config.num_mtp_heads
        whole = kv_cache_bytes(self.config, pages, self.cache_bytes)
        slots = heads + 1 if heads else 0
        exact = kv_cache_bytes(self.config, context_tokens, self.cache_bytes, slots, mtp_heads=heads)
        return whole.global_layers + exact.sliding_layers + exact.mtp_heads

    def rotary_bytes(self, context_tokens: int) -> float:
        """Cosines and sines of every position for both kinds of layers, in fp32; all sequences share them."""
        kinds = sorted(set(self.config.layer_kinds))
        return FP32_BYTES * context_tokens * sum(self.config.rotary_dim(kind) for kind in kinds)

    def step_bytes(self, num_tokens: int = STEP_TOKENS) -> float:
        """What a step of so many tokens keeps while it runs: one layer's buffers, bf16 operands and fp32 sums.

        The heads run over a window more of them behind a prompt.
        """
        config = self.config
        kinds = [config.attention(kind) for kind in sorted(set(config.layer_kinds))]
        choices = config.moe.num_experts_per_token if config.moe else 1
        inner = max(config.dense_dim, config.moe.expert_dim if config.moe else 0)
        projected = max(a.num_heads * a.qk_head_dim + a.num_kv_heads * (a.qk_head_dim + a.v_head_dim) for a in kinds)
        operands = max(a.num_heads * (a.qk_head_dim + a.v_head_dim) for a in kinds) + choices * inner
        # The residual stream, the last layer's output, and what experts add to it; its norm, and for heads two of them.
        sums = projected + (2 + choices) * config.hidden_size
        token = FP32_BYTES * sums + BF16_BYTES * (operands + 2 * config.hidden_size)
        sliding = config.sliding_attention
        window = sliding.window_keys or 0
        # A prompt's keys and values of a sliding layer, in a row.
        row = BF16_BYTES * sliding.num_kv_heads * (sliding.qk_head_dim + sliding.v_head_dim)
        return (num_tokens + (window if config.num_mtp_heads else 0)) * token + (num_tokens + window) * row

    def most_sequences(self, context_tokens: int) -> int:
        """How many sequences of that length the replica holds at once; 0 if weights and one sequence do not fit."""
        free = USABLE * self.fleet.device.memory - self.weight_bytes()
        return max(0, math.floor(free / self.sequence_bytes(context_tokens))) * self.ranks

    def decode_step(self, batch: int, context_tokens: int, *, tokens: int = 1) -> StepTime:
        """A step that feeds `tokens` tokens of each of `batch` sequences."""
        local = math.ceil(batch / self.ranks)
        caches = local * kv_cache_bytes(self.config, context_tokens, self.cache_bytes).total
        flops = local * tokens * forward_flops(self.config, context_tokens)
        return self._limit(self._read_seconds(batch * tokens, caches), flops, local * tokens, self.config.num_layers)

    def draft_step(self, batch: int) -> StepTime:
        """All heads in turn on every sequence."""
        config, heads = self.config, self.config.num_mtp_heads
        local = math.ceil(batch / self.ranks)
        main = step_weight_reads(config, 1, weight_bits=self.weight_bits)
        both = step_weight_reads(config, 1, weight_bits=self.weight_bits, mtp_heads=heads)
        window = kv_cache_bytes(config, config.sliding_attention.window_keys or 0, self.cache_bytes, mtp_heads=heads)
        num_bytes = both.shared - main.shared + local * window.mtp_heads
        flops = local * (forward_flops(config, 1, mtp_heads=heads) - forward_flops(config, 1))
        return self._limit(num_bytes / self.fleet.device.read_bandwidth(num_bytes), flops, 0, heads)

    def prefill(self, num_tokens: int) -> StepTime:
        """One prompt on each rank, alone."""
        seconds = self._read_seconds(num_tokens * self.ranks, 0)
        return self._limit(seconds, prefill_flops(self.config, num_tokens), num_tokens, self.config.num_layers)

    def drafting(self, batch: int, context_tokens: int, acceptance_length: float) -> Drafting:
        """Speed-up by all heads; the acceptance length is tokens per step, 1 to heads + 1. Raises: ConfigError."""
        heads = self.config.num_mtp_heads
        if not 1 <= acceptance_length <= heads + 1:
            raise ConfigError(f"an acceptance length of {acceptance_length:g} is outside 1 to {heads + 1}")
        plain = self.decode_step(batch, context_tokens).seconds
        verify = self.decode_step(batch, context_tokens, tokens=heads + 1).seconds
        speedup = acceptance_length * plain / (verify + self.draft_step(batch).seconds)
        return Drafting(batch=batch, acceptance_length=acceptance_length, speedup=speedup)

    def _read_seconds(self, num_tokens: int, cache_bytes: float) -> float:
        """Of reading the weights that so many tokens need, and the caches of their sequences.

        What every step reads can stay close to the processor if a whole step fits there. Which experts it reads
        changes, so they come from where all of them fit.
        """
        reads = step_weight_reads(self.config, num_tokens, weight_bits=self.weight_bits)
        always, experts = reads.shared + cache_bytes, reads.experts / self.ranks
        all_experts = count_parameters(self.config).experts * self.weight_bits / 8 / self.ranks
        device = self.fleet.device
        near, far = device.read_bandwidth(always + experts), device.read_bandwidth(always + all_experts)
        return always / near + experts / far

    def _limit(self, read_seconds: float, flops: float, routed_tokens: int, num_layers: int) -> StepTime:
        device = self.fleet.device
        parts = {
            "memory": read_seconds,
            "products": flops / device.peak(self.weights),
            "links": self._exchanged(routed_tokens) / self.fleet.rate_between(self.ranks),
        }
        bound = max(parts, key=lambda name: parts[name])
        return StepTime(seconds=parts[bound] + num_layers * device.layer_seconds, bound=bound)

    def _exchanged(self, num_tokens: int) -> float:
        """Bytes that a rank sends: its tokens to their experts' ranks, and results back, in bf16."""
        moe = self.config.moe
        if moe is None or self.ranks == 1:
            return 0.0
        # Ranks other than its own that hold one of a token's experts.
        others = self.ranks - 1
        reached = others * (1 - (1 - 1 / self.ranks) ** moe.num_experts_per_token)
        return 2.0 * BF16_BYTES * num_tokens * reached * self.config.hidden_size * self.config.num_moe_layers
