"""What a rollout leaves for training: one record per answer.

Suffixes: P prompt tokens, R answer tokens, L sparse layers, k chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from openmimo.engine import Completion, DraftStats
from openmimo.errors import TrainingError
from openmimo.tasks import Problem


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A problem that is to be answered. `source` counts the recipe's sources, `index` the source's problems.

    `seed` makes the random numbers of its answers; `number` counts all prompts of a run.
    """

    number: int
    source: int
    index: int
    problem: Problem
    token_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One answer with everything that was recorded while it was sampled.

    `logprobs_R` are those of the distribution drawn from, `versions_R` the versions of the weights. `routes` has shape
    (P + R - 1, L, k): the last token was never fed; None if they were not recorded.
    """

    prompt: Prompt
    choice: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs_R: npt.NDArray[np.float32]
    versions_R: npt.NDArray[np.int64]
    routes: npt.NDArray[np.uint8 | np.uint16] | None = None
    reward: float = 0.0
    grade_status: str = ""
    draft: DraftStats = field(default_factory=DraftStats)

    @property
    def domain(self) -> str:
        return self.prompt.problem.domain

    @property
    def num_inputs(self) -> int:
        """Tokens that training feeds: all but the last."""
        return len(self.prompt.token_ids) + len(self.token_ids) - 1

    @staticmethod
    def from_completion(prompt: Prompt, completion: Completion) -> Trajectory:
        """Raises: TrainingError if it broke off, has no log-probabilities, or routes of other tokens than were fed."""
        size = len(completion.token_ids)
        if completion.finish_reason == "error":
            raise TrainingError(
                f"after {size} tokens of an answer the policy's logits are no numbers; go on from an earlier "
                "checkpoint with a lower learning rate"
            )
        if completion.logprobs is None or len(completion.logprobs) != size:
            raise TrainingError(f"an answer of {size} tokens has no log-probabilities; ask the sampler for them")
        routes, fed = completion.routed_experts, len(prompt.token_ids) + size - 1
        if routes is not None and len(routes) != fed:
            raise TrainingError(f"an answer came with routes of {len(routes)} tokens; {fed} were fed")
        versions_R = np.zeros(size, np.int64)
        for place, version in completion.weights_versions:
            versions_R[place:] = version
        return Trajectory(
            prompt=prompt,
            choice=completion.choice,
            token_ids=completion.token_ids,
            text=completion.text,
            finish_reason=completion.finish_reason,
            logprobs_R=np.array(completion.logprobs, np.float32),
            versions_R=versions_R,
            routes=routes,
            draft=completion.draft,
        )


Group = tuple[Trajectory, ...]
"""The answers to one prompt."""
