"""This machine as a device that plans are made for: memory, bandwidths, peak, and what a layer costs beside them."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import median

import torch

from openmimo.config.cost import decode_step_bytes
from openmimo.config.model import preset
from openmimo.engine.native_runner import NativeRunner
from openmimo.errors import RequestError
from openmimo.evals.bench_limits import MOST_READ_BYTES
from openmimo.evals.measuring import MemoryReader, matmul_peak
from openmimo.evals.runner_target import RunnerTarget
from openmimo.model.model import build_model
from openmimo.planning.devices import HERE, Device

# The model whose steps are nearly all overhead.
SMALLEST = "nano"
FEWEST_READ_BYTES = 1 << 20
STEPS, ROUNDS = 64, 5


def measure_here(memory: float, threads: int) -> Device:
    """Cost: a few seconds. Without the C++ runtime layers cost nothing beside bytes and products."""
    torch.set_num_threads(threads)
    reads = read_rates(MemoryReader(MOST_READ_BYTES))
    device = Device(
        name=HERE,
        memory=memory,
        bandwidth=reads[-1][1],
        flops={"bf16": matmul_peak(torch.bfloat16), "fp32": matmul_peak(torch.float32)},
        link=1.0,
        network=1.0,
        per_node=1,
        reads=reads,
    )
    return replace(device, layer_seconds=layer_seconds(device, threads))


def read_rates(reader: MemoryReader, *, rounds: int = 5, min_seconds: float = 0.02) -> tuple[tuple[float, float], ...]:
    """Bytes read over and over, and bytes per second, from what fits in a small cache to what fits in none.

    `reader` has MOST_READ_BYTES. The median of the rounds, not the fastest: a plan says what a step will take, not what
    it could.
    """
    sizes = [1 << power for power in range(FEWEST_READ_BYTES.bit_length() - 1, MOST_READ_BYTES.bit_length())]
    return tuple(
        (float(size), reader.bandwidth(size, rounds=rounds, min_seconds=min_seconds, of_rounds=median))
        for size in sizes
    )


def layer_seconds(device: Device, threads: int) -> float:
    """What a decoding step of the smallest model takes beside reading it at the device's speed, per layer."""
    config = preset(SMALLEST)
    model = build_model(config, dtype=torch.bfloat16)
    try:
        target = RunnerTarget(lambda rows, pages: NativeRunner(model, num_rows=rows, num_pages=pages, threads=threads))
    except RequestError:
        return 0.0
    draw = random.Random(0)
    ids = [draw.randrange(config.vocab_size) for _ in range(STEPS)]
    seconds: list[float] = []
    for _ in range(ROUNDS + 1):
        target.start([ids[:8]], room=STEPS)
        seconds.append(target.decode([[token] for token in ids]) / STEPS)
    num_bytes = decode_step_bytes(config, batch_size=1, context_tokens=STEPS // 2)
    return max(0.0, median(seconds[1:]) - num_bytes / device.read_bandwidth(num_bytes)) / config.num_layers
