"""Which layout to choose for serving on a group of devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from openmimo.config.model import ModelConfig
from openmimo.planning.devices import Fleet, rank_counts
from openmimo.planning.serving import Replica

# Sequences per device beyond which waiting for a token takes too long to be worth more throughput.
MOST_PER_DEVICE = 256


@dataclass(frozen=True, kw_only=True)
class ServingLayout:
    """`replicas` copies of the model on `ranks` devices each, with `batch` sequences in flight on each copy.

    `tokens_per_second` is the limit of all together without drafts, `alone_tokens_per_second` that of one sequence
    alone on a copy; `most_sequences` is what a copy has room for.
    """

    ranks: int
    replicas: int
    weights: str
    weight_bytes: float
    sequence_bytes: float
    most_sequences: int
    batch: int
    step_seconds: float
    bound: str
    alone_tokens_per_second: float

    @property
    def tokens_per_second(self) -> float:
        return self.replicas * self.batch / self.step_seconds


def plan_serving(
    config: ModelConfig, fleet: Fleet, *, context_tokens: int, weights: str = "bf16", cache: str = "bf16"
) -> ServingLayout | None:
    """The layout with the highest limit of all that fit; None if not one sequence fits on all devices together."""
    found: list[ServingLayout] = []
    for ranks in rank_counts(config, fleet.count):
        replica = Replica(config, fleet, ranks=ranks, weights=weights, cache=cache)
        most = replica.most_sequences(context_tokens)
        if most:
            batch = min(most, MOST_PER_DEVICE * ranks)
            step = replica.decode_step(batch, context_tokens)
            found.append(
                ServingLayout(
                    ranks=ranks,
                    replicas=fleet.count // ranks,
                    weights=weights,
                    weight_bytes=replica.weight_bytes(),
                    sequence_bytes=replica.sequence_bytes(context_tokens),
                    most_sequences=most,
                    batch=batch,
                    step_seconds=step.seconds,
                    bound=step.bound,
                    alone_tokens_per_second=1 / replica.decode_step(1, context_tokens).seconds,
                )
            )
    return max(found, key=lambda layout: layout.tokens_per_second, default=None)


def devices_to_serve(
    config: ModelConfig, fleet: Fleet, *, context_tokens: int, weights: str = "bf16", cache: str = "bf16"
) -> int | None:
    """The fewest devices, in powers of two, that hold the weights and one sequence; None if no number does."""
    most = config.moe.num_experts if config.moe else 1
    for power in range(math.floor(math.log2(most)) + 1):
        bigger = Fleet(device=fleet.device, count=1 << power)
        replica = Replica(config, bigger, ranks=bigger.count, weights=weights, cache=cache)
        if most % bigger.count == 0 and replica.most_sequences(context_tokens):
            return bigger.count
    return None
