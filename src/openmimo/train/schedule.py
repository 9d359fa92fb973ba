"""Learning rates over a stage: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math


def learning_rate(kind: str, step: int, *, steps: int, warmup: int, start: float, end: float) -> float:
    """The rate of step `step` (0-based) of a stage of `steps`: linear from 0 to `start`, then to `end` by `kind`."""
    if step < warmup:
        return start * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    if kind == "constant":
        return start
    if kind == "linear":
        return start + (end - start) * progress
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
