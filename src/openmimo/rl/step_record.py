"""The figures of a step, as one line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from openmimo.engine import DraftStats
from openmimo.rl.monitors import Mismatch
from openmimo.rl.rollout import RolloutStats
from openmimo.rl.trajectory import Group
from openmimo.rl.update import UpdateStats


def step_record(
    groups: Sequence[Group], rolled: RolloutStats, updates: Sequence[UpdateStats], native: Mismatch | None
) -> dict[str, Any]:
    """Rewards, drafting and mismatch of a step. `native` is the mismatch when routers choose for themselves.

    `uniform_share` of the groups had equal rewards; figures of updates are those of the first, before the weights
    moved, but for losses and norms, which are means.
    """
    answers = [one for group in groups for one in group]
    by_domain: dict[str, list[float]] = {}
    for one in answers:
        by_domain.setdefault(one.domain, []).append(one.reward)
    record: dict[str, Any] = {
        "reward": _mean([one.reward for one in answers]),
        "rewards": {domain: _mean(values) for domain, values in sorted(by_domain.items())},
        "uniform_share": _mean([float(len({one.reward for one in group}) == 1) for group in groups]),
        "stopped_share": _mean([float(one.finish_reason == "stop") for one in answers]),
        "grader_failures": sum(one.grade_status not in ("", "ok") for one in answers),
        "acceptance_length": DraftStats.merge(one.draft for one in answers).acceptance_length,
        "rollout": asdict(rolled),
        "native_mismatch": None if native is None else asdict(native),
        "num_updates": len(updates),
    }
    if updates:
        first = updates[0]
        record |= {
            "loss": _mean([each.loss for each in updates]),
            "grad_norm": _mean([each.grad_norm for each in updates]),
            "applied": all(each.applied for each in updates),
            "mtp_loss": first.mtp_loss,
            "entropy": first.entropy,
            "masked_share": first.masked,
            "mismatch": asdict(first.mismatch),
            "trained_tokens": sum(each.num_tokens for each in updates),
        }
    return record


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
