"""What is watched during training: zero gradients, expert load, throughput."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openmimo.kernels.products import matmul
from openmimo.parallel.parts import local

if TYPE_CHECKING:
    from openmimo.parallel.ranks import Ranks


def num_zeros(model: nn.Module, counted: Mapping[str, int] | None = None, ranks: Ranks | None = None) -> dict[str, int]:
    """How many gradient entries are exactly zero: in all, per layer and MTP head, and per layer's experts.

    A parameter without a gradient counts as all zeros. Rising counts mean that experts or units no longer get tokens;
    falling counts in fine-tuning accompany over-fitting. `counted` has the counts of all parameters with a gradient
    where they are known, as an optimiser's `zero_counts`. With `ranks` all of them must ask, each with its own counts.
    Cost: one pass over the gradients, none with `counted`.   Source: MiMo-V2-Flash report, stability metric of SFT.
    """
    if counted is None:
        present = [(name, local(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
        parts = [grad.numel() - torch.count_nonzero(grad) for _, grad in present]
        numbers = torch.stack(parts).tolist() if parts else []
        counted = dict(zip((name for name, _ in present), numbers, strict=True))
    if ranks is not None:
        counted = dict(zip(counted, map(int, ranks.sums(*counted.values())), strict=True))
    counts = {name: counted.get(name, p.numel()) for name, p in model.named_parameters()}
    groups: dict[str, int] = {"all": sum(counts.values())}
    for name, count in counts.items():
        for group in _groups(name):
            groups[group] = groups.get(group, 0) + count
    return groups


def expert_load(tokens_per_expert_LE: Tensor) -> dict[str, float]:
    """The busiest expert's load over the mean, in the worst layer and averaged over layers (1 is even)."""
    load_LE = tokens_per_expert_LE.float()
    ratio_L = load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-9)
    return {"worst": float(ratio_L.max()), "mean": float(ratio_L.mean())}


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu", *, seconds: float = 0.3) -> float:
    """FLOP/s of a square product in this dtype on this device, best of the runs that fit into `seconds`."""
    size = 1024 if torch.device(device).type == "cpu" else 8192  # a GPU needs more rows to fill all its units
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        _ = matmul(a, a)[0, 0].item()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def git_revision() -> str | None:
    """The commit of the source tree that runs, with `+` when it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _groups(name: str) -> list[str]:
    parts = name.split(".")
    if parts[0] not in ("layers", "mtp_heads"):
        return [parts[0]]
    layer = f"{parts[0]}.{parts[1]}"
    return [layer, f"{layer}.experts"] if "experts" in parts else [layer]
