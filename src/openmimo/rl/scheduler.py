"""Which problems are answered next: shares by sampled tokens, priorities, and what past answers say about a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from openmimo.config.rl import RLRecipe
from openmimo.errors import TrainingError
from openmimo.rl.trajectory import Group, Prompt
from openmimo.tasks import sample_problem

# A prompt that was always right or always wrong is drawn again only after this many other draws of its source.
REST_DRAWS = 64


class PromptScheduler:
    """Deals out prompts; everything it knows is in `state()`, so a run goes on with the prompt that would have come.

    The source that is furthest behind its share of the sampled tokens goes next, among those of the highest priority
    that are behind. Tokens of prompts in flight count with the source's mean length so far.
    """

    def __init__(self, recipe: RLRecipe, render: Callable[[str], list[int]]) -> None:
        self.recipe, self.render = recipe, render
        count = len(recipe.sources)
        self._cursor = [0] * count  # problems drawn so far
        self._tokens = [0] * count  # tokens sampled so far
        self._answers = [0] * count
        self._in_flight = [0] * count  # answers
        self._num_prompts = 0
        # Passed and graded answers by source and problem, for sources that repeat their problems.
        self._history: dict[str, list[int]] = {}
        self._resting: dict[str, int] = {}

    def next(self) -> Prompt:
        """The next prompt to answer, with a seed of its own."""
        source = self._pick()
        number, index = self._num_prompts, self._next_index(source)
        self._num_prompts += 1
        prompt = self.prompt(number, source, index)
        self.hold(prompt)
        return prompt

    def prompt(self, number: int, source: int, index: int) -> Prompt:
        """Prompt `number` of the run, problem `index` of a source: these three make all the rest."""
        recipe, rollout = self.recipe.sources[source], self.recipe.rollout
        problem = sample_problem(
            recipe.domain,
            split=recipe.split,
            level=recipe.levels[index % len(recipe.levels)],
            seed=self.recipe.seed,
            index=index,
            task=recipe.task or None,
        )
        return Prompt(
            number=number,
            source=source,
            index=index,
            problem=problem,
            token_ids=tuple(self.render(problem.prompt)),
            seed=self.recipe.seed * 1_000_003 + number,
            max_tokens=recipe.max_tokens or rollout.max_tokens,
            temperature=recipe.temperature or rollout.temperature,
        )

    def record(self, group: Group) -> None:
        """Count a finished group: its tokens and, for problems that come again, how many answers passed."""
        prompt = group[0].prompt
        self._tokens[prompt.source] += sum(len(one.token_ids) for one in group)
        self._answers[prompt.source] += len(group)
        self._in_flight[prompt.source] -= len(group)
        if self.recipe.sources[prompt.source].num_prompts:
            key = f"{prompt.source}/{prompt.index}"
            passed, graded = self._history.get(key, [0, 0])
            passed, graded = passed + sum(one.reward > 0.5 for one in group), graded + len(group)
            self._history[key] = [passed, graded]
            if passed in (0, graded):
                self._resting[key] = self._cursor[prompt.source] + REST_DRAWS

    def pass_rate(self, source: int, index: int) -> float | None:
        """The share of right answers to a problem so far, or None if it was never graded."""
        passed, graded = self._history.get(f"{source}/{index}", [0, 0])
        return passed / graded if graded else None

    def state(self) -> dict[str, Any]:
        """Plain JSON. Prompts in flight are not in it: whoever holds them saves them."""
        return {
            "cursor": list(self._cursor),
            "tokens": list(self._tokens),
            "answers": list(self._answers),
            "num_prompts": self._num_prompts,
            "history": {key: list(counts) for key, counts in self._history.items()},
            "resting": dict(self._resting),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`. Raises: TrainingError if it belongs to other sources."""
        if len(state["cursor"]) != len(self._cursor):
            raise TrainingError(
                f"the saved scheduler has {len(state['cursor'])} sources, the recipe {len(self._cursor)}; "
                "resume with the recipe of the run"
            )
        self._cursor, self._tokens = list(state["cursor"]), list(state["tokens"])
        self._answers, self._num_prompts = list(state["answers"]), int(state["num_prompts"])
        self._history = {key: list(counts) for key, counts in state["history"].items()}
        self._resting = {key: int(until) for key, until in state["resting"].items()}
        self._in_flight = [0] * len(self._cursor)

    def hold(self, prompt: Prompt) -> None:
        """Count a prompt as in flight: one that is dealt out, or was when the state was saved."""
        self._in_flight[prompt.source] += self.recipe.rollout.group_size

    def shares(self) -> dict[str, float]:
        """Each domain's share of the tokens, as the recipe wants it."""
        total = sum(source.weight for source in self.recipe.sources)
        shares: dict[str, float] = {}
        for source in self.recipe.sources:
            shares[source.domain] = shares.get(source.domain, 0.0) + source.weight / total
        return shares

    def _pick(self) -> int:
        sources = self.recipe.sources
        guess = self.recipe.rollout.max_tokens / 2
        spent = [
            tokens + flying * (tokens / answers if answers else guess)
            for tokens, flying, answers in zip(self._tokens, self._in_flight, self._answers, strict=True)
        ]
        total, weights = sum(spent), sum(source.weight for source in sources)
        # A source is behind when it has at most its share of what is spent; one always is.
        level = [tokens / source.weight for tokens, source in zip(spent, sources, strict=True)]
        behind = [index for index, value in enumerate(level) if value <= total / weights * (1 + 1e-9)]
        return min(behind, key=lambda index: (-sources[index].priority, level[index], index))

    def _next_index(self, source: int) -> int:
        """The next problem of a source; of those that come again, resting ones are passed over."""
        num_prompts = self.recipe.sources[source].num_prompts
        for _ in range(max(1, num_prompts)):
            draw = self._cursor[source]
            self._cursor[source] += 1
            if not num_prompts:
                return draw
            if self._resting.get(f"{source}/{draw % num_prompts}", 0) <= draw:
                return draw % num_prompts
        return self._cursor[source] % num_prompts
