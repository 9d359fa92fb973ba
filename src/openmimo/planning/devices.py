"""Devices and groups of them: what a plan has to know of the hardware."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from openmimo.config.model import ModelConfig
from openmimo.errors import ConfigError, nearest

GB = 1e9
# What `parse_fleet` takes as the machine that the plan is made on.
HERE = "here"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one CPU machine.

    `bandwidth` is that of its memory, `link` what it sends to others of its node, `network` what it sends to other
    nodes, all in bytes/s in one direction. `flops` has dense products per second by number format. `reads` refines
    `bandwidth` where caches matter: (bytes read over and over, bytes/s), rising. `layer_seconds` is what a layer takes
    beside bytes and FLOPs: launches, barriers.
    """

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    link: float
    network: float
    per_node: int = 8
    reads: tuple[tuple[float, float], ...] = ()
    layer_seconds: float = 0.0

    def peak(self, weights: str) -> float:
        """Products per second with weights of that format; formats that it cannot multiply are unpacked to bf16."""
        return self.flops.get(weights, self.flops["bf16"])

    def read_bandwidth(self, num_bytes: float) -> float:
        """Bytes/s of reading so many bytes again and again."""
        rates = [rate for size, rate in self.reads if size >= num_bytes]
        return rates[0] if rates else self.bandwidth


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """`count` equal devices."""

    device: Device
    count: int

    @property
    def name(self) -> str:
        return self.device.name if self.count == 1 else f"{self.count} x {self.device.name}"

    def rate_between(self, ranks: int) -> float:
        """Bytes/s that each of `ranks` devices sends to the others; the slowest link counts."""
        return self.device.link if ranks <= self.device.per_node else self.device.network


def _gpu(
    name: str, memory: float, bandwidth: float, bf16: float, fp8: float, link: float, network: float = 50
) -> tuple[str, Device]:
    """From datasheets: GB, GB/s, dense TFLOP/s, GB/s in one direction. Without FP8 products `fp8` is 0."""
    flops = {"bf16": bf16 * 1e12, **({"fp8": fp8 * 1e12} if fp8 else {})}
    return name, Device(
        name=name,
        memory=memory * GB,
        bandwidth=bandwidth * GB,
        flops=flops,
        link=link * GB,
        network=network * GB,
    )


# NVIDIA's and AMD's datasheets; one 400 Gb/s network card per device in a node of eight, 100 Gb/s for cards on PCIe.
KNOWN: Mapping[str, Device] = dict(
    (
        _gpu("a100", 80, 2039, 312, 0, 300, 25),
        _gpu("h100", 80, 3350, 989, 1979, 450),
        _gpu("h200", 141, 4800, 989, 1979, 450),
        _gpu("h20", 96, 4000, 148, 296, 450),
        _gpu("b200", 180, 8000, 2250, 4500, 900),
        _gpu("mi300x", 192, 5300, 1307, 2615, 448),
        _gpu("l40s", 48, 864, 362, 733, 32, 12.5),
        _gpu("rtx4090", 24, 1008, 165, 330, 32, 12.5),
    )
)


def parse_fleet(text: str, here: Device | None = None) -> Fleet:
    """`h200:8`, `rtx4090`, or `here` for this machine. Raises: ConfigError for another name or number."""
    matched = re.fullmatch(r"([a-z0-9_-]+)(?::([1-9][0-9]{0,6}))?", text.strip().lower())
    if matched is None:
        raise ConfigError(f"devices {text!r} cannot be read; write a name and a number, such as h200:8")
    name, count = matched[1], int(matched[2] or 1)
    device = here if name == HERE else KNOWN.get(name)
    if name == HERE and count > 1:
        raise ConfigError(f"devices {text!r}: this machine is one device; name a known one for several")
    if device is None:
        raise ConfigError(f"no device {name!r}; {nearest(name, (HERE, *KNOWN))}")
    return Fleet(device=device, count=count)


def rank_counts(config: ModelConfig, devices: int) -> list[int]:
    """Numbers of devices that a layer's experts can be divided among evenly, out of `devices`."""
    experts = config.moe.num_experts if config.moe else 1
    return [ranks for ranks in range(1, devices + 1) if devices % ranks == 0 and experts % ranks == 0]
