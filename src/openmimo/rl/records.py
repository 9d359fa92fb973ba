"""Trajectories and unfinished answers as plain JSON, for checkpoints of a run that has some in flight."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from openmimo.engine import DraftStats, PartialAnswer
from openmimo.rl.trajectory import Prompt, Trajectory

State = dict[str, Any]


def prompt_name(prompt: Prompt) -> tuple[int, int, int]:
    """What the scheduler makes the prompt from."""
    return prompt.number, prompt.source, prompt.index


def trajectory_state(one: Trajectory) -> State:
    return {
        "choice": one.choice,
        "token_ids": list(one.token_ids),
        "text": one.text,
        "finish_reason": one.finish_reason,
        "logprobs": _packed(one.logprobs_R),
        "versions": _packed(one.versions_R),
        "routes": None if one.routes is None else _packed(one.routes),
        "reward": one.reward,
        "grade_status": one.grade_status,
        "draft": [list(one.draft.histogram), list(one.draft.proposed)],
    }


def trajectory_from(state: Mapping[str, Any], prompt: Prompt) -> Trajectory:
    return Trajectory(
        prompt=prompt,
        choice=state["choice"],
        token_ids=tuple(state["token_ids"]),
        text=state["text"],
        finish_reason=state["finish_reason"],
        logprobs_R=_unpacked(state["logprobs"]),
        versions_R=_unpacked(state["versions"]),
        routes=None if state["routes"] is None else _unpacked(state["routes"]),
        reward=state["reward"],
        grade_status=state["grade_status"],
        draft=DraftStats(histogram=tuple(state["draft"][0]), proposed=tuple(state["draft"][1])),
    )


def part_state(part: PartialAnswer) -> State:
    return {
        "choice": part.choice,
        "token_ids": list(part.token_ids),
        # fp64 in hexadecimal: not a bit is lost
        "logprobs": [value.hex() for value in part.logprobs],
        "routes": None if part.routed_experts is None else _packed(part.routed_experts),
        "weights_versions": [list(pair) for pair in part.weights_versions],
    }


def part_from(state: Mapping[str, Any]) -> PartialAnswer:
    return PartialAnswer(
        choice=state["choice"],
        token_ids=tuple(state["token_ids"]),
        logprobs=tuple(float.fromhex(value) for value in state["logprobs"]),
        routed_experts=None if state["routes"] is None else _unpacked(state["routes"]),
        weights_versions=tuple((place, version) for place, version in state["weights_versions"]),
    )


def _packed(array: npt.NDArray[Any]) -> State:
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
    }


def _unpacked(state: Mapping[str, Any]) -> npt.NDArray[Any]:
    return np.frombuffer(base64.b64decode(state["data"]), np.dtype(state["dtype"])).reshape(state["shape"]).copy()
