"""Sampling groups of answers: a sampler's protocol, and the worker that keeps it busy and counts every prompt once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from openmimo.config.rl import RLRecipe
from openmimo.engine import Completion, PartialAnswer, SamplingParams
from openmimo.errors import TrainingError
from openmimo.rl.records import part_from, part_state, prompt_name, trajectory_from, trajectory_state
from openmimo.rl.scheduler import PromptScheduler
from openmimo.rl.trajectory import Group, Prompt, Trajectory

if TYPE_CHECKING:
    from openmimo.model import MiMoModel


class Sampler(Protocol):
    """What post-training needs of an engine; `openmimo.engine.Engine` is one."""

    @property
    def weights_version(self) -> int: ...

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        index: int = 0,
        parts: Sequence[PartialAnswer] | None = None,
    ) -> int: ...

    def step_to_completions(self) -> list[tuple[int, Completion]]: ...

    def abort(self, request_id: int) -> None: ...

    def unfinished(self, request_id: int) -> tuple[PartialAnswer, ...]: ...

    def update_weights(self, model: MiMoModel) -> int: ...


@dataclass
class _Flight:
    """A prompt whose answers are being sampled; `done` are those that are finished, by choice."""

    prompt: Prompt
    done: dict[int, Trajectory] = field(default_factory=dict[int, Trajectory])
    oldest_version: int = 0


@dataclass(frozen=True, kw_only=True)
class RolloutStats:
    """One step's sampling. `replaced` groups taught nothing and others came in their place; `parked` answers wait.

    `num_tokens` counts the replaced groups too.
    """

    seconds: float
    num_answers: int
    num_tokens: int
    replaced: int
    parked: int
    partial_share: float
    staleness: int


class RolloutWorker:
    """Collects the groups of one step after another.

    A prompt is taken from the scheduler once, stays in flight until all its answers are finished, and is then given
    out once, or, if dynamic sampling replaces it, counted as replaced.
    """

    def __init__(
        self,
        sampler: Sampler,
        scheduler: PromptScheduler,
        recipe: RLRecipe,
        grade: Callable[[Sequence[Trajectory]], list[Trajectory]],
    ) -> None:
        self.sampler, self.scheduler, self.recipe, self.grade = sampler, scheduler, recipe, grade
        self._flights: dict[int, _Flight] = {}
        self._finished: list[Group] = []

    def collect(self, *, keeps_uniform: bool) -> tuple[list[Group], RolloutStats]:
        """`prompts` finished and graded groups, in the order of their prompts.

        With `keeps_uniform`, groups whose answers are all equally right stay, because a teacher has something to say
        about them; otherwise up to `resample * prompts` of them are replaced by other prompts' groups.
        """
        rollout, began = self.recipe.rollout, time.perf_counter()
        wanted, allowance, replaced = rollout.prompts, int(rollout.resample * rollout.prompts), 0
        replaced_tokens = 0
        groups, self._finished = self._finished, []
        while True:
            if len(groups) >= wanted and self._may_stop():
                break
            # What is parked keeps the sampler full; once the step has its groups, only what must finish goes on.
            ahead = 0 if rollout.partial else len(groups)
            while len(groups) < wanted and ahead + len(self._flights) < wanted:
                self._launch(self.scheduler.next())
            for group in self._advance():
                if not keeps_uniform and replaced < allowance and _is_uniform(group):
                    replaced += 1
                    replaced_tokens += sum(len(one.token_ids) for one in group)
                else:
                    groups.append(group)
        # The oldest first, so that none grows older than it may while it waits for its step.
        groups.sort(key=lambda group: (min(int(one.versions_R[0]) for one in group), group[0].prompt.number))
        groups, self._finished = groups[:wanted], groups[wanted:]
        groups.sort(key=lambda group: group[0].prompt.number)
        version = self.sampler.weights_version
        answers = [one for group in groups for one in group]
        mixed = sum(int(one.versions_R[0] != one.versions_R[-1]) for one in answers)
        stats = RolloutStats(
            seconds=time.perf_counter() - began,
            num_answers=len(answers),
            num_tokens=replaced_tokens + sum(len(one.token_ids) for one in answers),
            replaced=replaced,
            parked=self._num_open(),
            partial_share=mixed / len(answers),
            staleness=max(version - int(one.versions_R[0]) for one in answers),
        )
        return groups, stats

    def state(self) -> dict[str, Any]:
        """What is in flight, and what finished ahead of its step, as plain JSON."""
        return {
            "flights": [
                {
                    "prompt": prompt_name(flight.prompt),
                    "oldest_version": flight.oldest_version,
                    "done": [trajectory_state(one) for one in flight.done.values()],
                    "open": [part_state(part) for part in self.sampler.unfinished(request)],
                }
                for request, flight in self._flights.items()
            ],
            "finished": [
                {"prompt": prompt_name(group[0].prompt), "done": [trajectory_state(one) for one in group]}
                for group in self._finished
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`: finished answers stay, open ones are computed again up to where they were."""
        for saved in state["finished"]:
            prompt = self.scheduler.prompt(*saved["prompt"])
            self._finished.append(tuple(trajectory_from(one, prompt) for one in saved["done"]))
        for saved in state["flights"]:
            prompt = self.scheduler.prompt(*saved["prompt"])
            self.scheduler.hold(prompt)
            request = self._launch(prompt, [part_from(part) for part in saved["open"]])
            flight = self._flights[request]
            flight.oldest_version = saved["oldest_version"]
            flight.done = {one["choice"]: trajectory_from(one, prompt) for one in saved["done"]}

    def _launch(self, prompt: Prompt, parts: Sequence[PartialAnswer] | None = None) -> int:
        params = SamplingParams(
            temperature=prompt.temperature,
            top_p=self.recipe.rollout.top_p,
            max_tokens=prompt.max_tokens,
            n=self.recipe.rollout.group_size,
            seed=prompt.seed,
            logprobs=True,
            routed_experts=self.recipe.rollout.replay,
        )
        request = self.sampler.add_request(prompt.token_ids, params, parts=parts)
        self._flights[request] = _Flight(prompt, oldest_version=self.sampler.weights_version)
        return request

    def _advance(self) -> list[Group]:
        """One step of the sampler; the groups that it finished, graded."""
        finished: list[Group] = []
        for request_id, completion in self.sampler.step_to_completions():
            flight = self._flights.get(request_id)
            if flight is None:
                continue  # of somebody else who uses the same engine
            self._land(flight, completion)
            if len(flight.done) == self.recipe.rollout.group_size:
                del self._flights[request_id]
                group = tuple(self.grade([flight.done[choice] for choice in sorted(flight.done)]))
                self.scheduler.record(group)
                finished.append(group)
        return finished

    def _land(self, flight: _Flight, completion: Completion) -> None:
        if completion.choice in flight.done:
            raise TrainingError(f"answer {completion.choice} of prompt {flight.prompt.number} came twice")
        flight.done[completion.choice] = Trajectory.from_completion(flight.prompt, completion)

    def _may_stop(self) -> bool:
        """Whether what is unfinished may be parked: not too many, and none that would become too old."""
        rollout = self.recipe.rollout
        if not self._flights:
            return True
        if not rollout.partial:
            return False
        next_version = self.sampler.weights_version + 1
        too_old = any(next_version - each.oldest_version > rollout.max_staleness for each in self._flights.values())
        limit = rollout.max_partial_share * rollout.prompts * rollout.group_size
        return not too_old and self._num_open() <= limit

    def _num_open(self) -> int:
        return sum(self.recipe.rollout.group_size - len(flight.done) for flight in self._flights.values())


def _is_uniform(group: Group) -> bool:
    return len({one.reward for one in group}) == 1
