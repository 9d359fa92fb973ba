"""What the hardware allows, measured in the same run as the engines: the figure beside every figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

import torch

from openmimo.config.cost import decode_step_bytes, prefill_flops
from openmimo.config.cost import forward_flops as step_flops
from openmimo.config.model import ModelConfig
from openmimo.evals.bench_target import WEIGHT_BITS, Weights
from openmimo.evals.measuring import MemoryReader, matmul_peak

# Beyond this no cache holds it, and a larger buffer measures the same.
MOST_READ_BYTES = 1 << 29


@dataclass(frozen=True)
class Limits:
    """The fastest that this machine could run a model: bytes over read bandwidth, FLOPs over the matmul peak.

    The peak is that of PyTorch's bf16 (or fp32) products, which is a strong library's rate and no law of nature:
    good kernels may pass it. Bandwidth is measured on as many bytes as a step reads, so that a model that fits into a
    cache is compared with that cache; and anew in every call, because the memory of shared machines changes its speed
    within seconds: callers ask in turns with what they measure.
    """

    config: ModelConfig
    weights: Weights
    flops_per_s: float
    _readers: dict[int, MemoryReader] = field(default_factory=dict[int, MemoryReader])

    @staticmethod
    def measure(config: ModelConfig, weights: Weights) -> Limits:
        """Cost: about a second."""
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        return Limits(config, weights, matmul_peak(dtype))

    def prefill_tokens_per_s(self, num_tokens: int) -> float:
        return num_tokens * self.flops_per_s / prefill_flops(self.config, num_tokens)

    def decode_tokens_per_s(self, batch_size: int, context_tokens: int) -> float:
        """For all sequences together: whichever of bytes and FLOPs takes longer."""
        num_bytes = decode_step_bytes(
            self.config,
            batch_size=batch_size,
            context_tokens=context_tokens,
            weight_bits=WEIGHT_BITS[self.weights],
            cache_bytes_per_value=2,
        )
        by_bytes = num_bytes / self.bandwidth(num_bytes)
        by_flops = batch_size * step_flops(self.config, context_tokens) / self.flops_per_s
        return batch_size / max(by_bytes, by_flops)

    def bandwidth(self, num_bytes: int) -> float:
        """Bytes per second of reading a set of that size again and again; sizes are rounded down to a power of two."""
        size = min(MOST_READ_BYTES, 1 << max(16, num_bytes.bit_length() - 1))
        if size not in self._readers:
            self._readers.clear()
            self._readers[size] = MemoryReader(size)
        return self._readers[size].bandwidth(size, rounds=3, of_rounds=median)
