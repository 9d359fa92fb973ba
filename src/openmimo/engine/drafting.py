"""How many drafts to verify: as many as are expected to raise tokens per second, judged by what was measured.

A step's time depends on how many tokens it feeds (in a mixture of experts more tokens touch more experts), a draft's
worth on how often this answer's drafts of that head were kept. Nothing here changes what is written.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Sequence as Seq

from openmimo.engine.sequence import Sequence

# What is believed of a head before anything was measured, and how many measurements that belief weighs.
FIRST_ACCEPTANCE, ENGINE_WEIGHT, ANSWER_WEIGHT = 0.7, 4, 6
# Slowest learning rates: of an answer, of an answer on trial, of the engine.
ANSWER_RATE, TRIAL_RATE, ENGINE_RATE = 0.05, 0.25, 0.02
# Learning rate of a time per step since its size was measured last, and the fastest: machines change their speed; an
# old time must not be compared with a new one.
COST_RATE, MOST_COST_RATE = 0.1, 0.5
# Measurements that make a size known, and how far from it, as a factor, they may lie on both sides.
ENOUGH, NEARBY = 3, 1.6
# Drafts must promise this much more speed than none.
MARGIN = 1.02
# Where no step's time is known, drafts must be right with this probability.
LIKELY = 0.5
# Steps between two decisions for the same answers, and in a trial of drafts that are not worth it; such trials may cost
# this share of the time.
HOLD, TRIAL, TRIAL_SHARE = 4, 6, 0.01
# Steps between two measurements of plain decoding: few where drafts promise less than CLEAR times its speed.
REMEASURE, REMEASURE_SOON, CLEAR = 512, 64, 1.25
# Steps between two decisions while no answer drafts: decisions are not free either.
REST = 32


class CostModel:
    """Seconds of a call by its size: exponential averages of what was measured, straight lines between them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.means: list[float] = []
        self.counts: list[int] = []
        self.measured_at: list[int] = []
        self.num_observed = 0

    def observe(self, size: int, seconds: float) -> None:
        """Take a measurement in. The first few count by their minimum, later ones up to 1.5 times the mean."""
        self.num_observed += 1
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes) or self.sizes[place] != size:
            self.sizes.insert(place, size)
            self.means.insert(place, seconds)
            self.counts.insert(place, 1)
            self.measured_at.insert(place, self.num_observed)
            return
        mean = self.means[place]
        self.counts[place] += 1
        if self.counts[place] <= ENOUGH:
            self.means[place] = min(mean, seconds)
        else:
            rate = min(COST_RATE * (self.num_observed - self.measured_at[place]), MOST_COST_RATE)
            self.means[place] = mean + rate * (min(seconds, 1.5 * mean) - mean)
        self.measured_at[place] = self.num_observed

    def knows(self, size: int) -> bool:
        """Whether this size, or sizes close to it on both sides, were measured often enough."""
        place = bisect_left(self.sizes, size)
        low = next((self.sizes[i] for i in range(place - 1, -1, -1) if self.counts[i] >= ENOUGH), 0)
        high = next((self.sizes[i] for i in range(place, len(self.sizes)) if self.counts[i] >= ENOUGH), None)
        return high is not None and (high == size or (low * NEARBY >= size and high <= size * NEARBY))

    def rising(self) -> CostModel:
        """The sizes that are known, none of them slower than a larger one: what was is the noise of a busy machine."""
        curve = CostModel()
        for size, mean, count in zip(reversed(self.sizes), reversed(self.means), reversed(self.counts), strict=True):
            if count >= ENOUGH:
                curve.sizes.append(size)
                curve.means.append(min(mean, curve.means[-1]) if curve.means else mean)
        curve.sizes.reverse()
        curve.means.reverse()
        return curve

    def seconds(self, size: int) -> float:
        """The expected time; beyond the measured sizes, that of the nearest one. Size 0 takes no time."""
        if not self.sizes or size == 0:
            return 0.0
        place = bisect_left(self.sizes, size)
        if place == len(self.sizes):
            return self.means[-1]
        if self.sizes[place] == size or place == 0:
            return self.means[place]
        low, high = self.sizes[place - 1], self.sizes[place]
        share = (size - low) / (high - low)
        return self.means[place - 1] + share * (self.means[place] - self.means[place - 1])


class DraftPolicy:
    """Chooses the `num_drafts` of adaptive answers, and learns from what the steps gave.

    Drafts join a step in the order of their expected worth while that raises expected tokens per second. Drafting that
    is switched off is tried again from time to time, on a credit of one percent of the time.
    """

    def __init__(self, num_heads: int) -> None:
        self.step_cost = CostModel()
        self.draft_cost = CostModel()
        self.acceptance = [FIRST_ACCEPTANCE] * num_heads
        self.num_learned = 0
        self.num_observed = 0
        self.credit = 0.0
        self.rest = 0
        self._countdown = 0
        self._remeasure = REMEASURE
        self._asked_at = -1
        self._members: list[Sequence] = []
        self._on_trial: Sequence | None = None

    def learn(self, sequence: Sequence, num_drafts: int, num_kept: int) -> None:
        """A step verified `num_drafts` drafts of an answer and kept the first `num_kept` of them."""
        own = sequence.acceptance = sequence.acceptance or list(self.acceptance)
        own_rate = max(ANSWER_RATE, 1 / (ANSWER_WEIGHT + sum(sequence.histogram)))
        if sequence is self._on_trial:
            own_rate = max(own_rate, TRIAL_RATE)
        self.num_learned += 1
        shared_rate = max(ENGINE_RATE, 1 / (ENGINE_WEIGHT + self.num_learned))
        for head in range(min(num_drafts, num_kept + 1)):
            hit = 1.0 if head < num_kept else 0.0
            own[head] += own_rate * (hit - own[head])
            self.acceptance[head] += shared_rate * (hit - self.acceptance[head])

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step of decoding alone fed `num_tokens` and took `seconds`, its head passes not counted."""
        self.step_cost.observe(num_tokens, seconds)
        self.credit += TRIAL_SHARE * seconds
        self._remeasure -= 1
        self.num_observed += 1

    def choose(self, adaptive: Seq[Sequence], num_others: int) -> None:
        """Set `num_drafts` of answers whose next step feeds their newest token.

        The step feeds `num_others` more tokens.
        """
        self._countdown -= 1
        self.rest = 0
        same = len(adaptive) == len(self._members) and all(map(operator.is_, adaptive, self._members))
        if same and self._countdown > 0:
            return
        self._countdown, self._members, self._on_trial = HOLD, list(adaptive), None
        plain = num_others + len(adaptive)
        full = plain + sum(sequence.draft_limit for sequence in adaptive)
        known = self.step_cost.knows(plain)
        asked_in_vain = not known and self._asked_at == self.num_observed
        self._asked_at = self.num_observed
        if asked_in_vain:
            self._go_by_acceptance(adaptive)
        elif not known or self._remeasure <= 0:
            self._countdown, self._remeasure = 1 if known else ENOUGH, REMEASURE
            _set_drafts(adaptive, 0)
        elif not self.step_cost.knows(full) or not self.draft_cost.knows(len(adaptive)):
            _set_drafts(adaptive, None)
        else:
            self._choose_best(adaptive, plain)
            self._try_again(adaptive, plain)
            if self._on_trial is None and not any(sequence.num_drafts for sequence in adaptive):
                self._countdown, self.rest = 0, REST

    def rests(self) -> bool:
        """Whether no answer drafts in the next step either, if they are the same as in the last one."""
        self.rest -= 1
        return self.rest >= 0

    def _go_by_acceptance(self, adaptive: Seq[Sequence]) -> None:
        """Every step feeds prompts too, so none measures decoding: verify drafts that are likely right."""
        for sequence in adaptive:
            worth, sequence.num_drafts = 1.0, 0
            for share in (sequence.acceptance or self.acceptance)[: sequence.draft_limit]:
                worth *= share
                sequence.num_drafts += worth >= LIKELY

    def _choose_best(self, adaptive: Seq[Sequence], plain: int) -> None:
        """Add drafts in the order of their worth, and stop where expected tokens per second are highest."""
        _set_drafts(adaptive, 0)
        worths: list[tuple[float, int]] = []
        for place, sequence in enumerate(adaptive):
            worth = 1.0
            for share in (sequence.acceptance or self.acceptance)[: sequence.draft_limit]:
                worth *= share
                worths.append((worth, place))
        worths.sort(key=operator.itemgetter(0), reverse=True)
        step_cost = self.step_cost.rising()
        fastest = plain / step_cost.seconds(plain)
        expected, best, num_best = float(plain), MARGIN * fastest, 0
        drafting: set[int] = set()
        for number, (worth, place) in enumerate(worths, 1):
            expected += worth
            drafting.add(place)
            seconds = step_cost.seconds(plain + number) + self.draft_cost.seconds(len(drafting))
            if expected > best * seconds:
                best, num_best = expected / seconds, number
        for _, place in worths[:num_best]:
            adaptive[place].num_drafts += 1
        if num_best and best < CLEAR * fastest:
            self._remeasure = min(self._remeasure, REMEASURE_SOON)

    def _try_again(self, adaptive: Seq[Sequence], plain: int) -> None:
        """If the credit pays for it, let the answer that has gone without drafts for longest draft for a few steps."""
        idle = [sequence for sequence in adaptive if sequence.num_drafts == 0]
        if not idle:
            return
        sequence = max(idle, key=lambda each: each.tokens_since_draft)
        fed, drafting = plain + sum(each.num_drafts for each in adaptive), len(adaptive) - len(idle)
        extra = self.step_cost.seconds(fed + sequence.draft_limit) - self.step_cost.seconds(fed)
        extra += self.draft_cost.seconds(drafting + 1) - self.draft_cost.seconds(drafting)
        price = TRIAL * max(extra, 0.0)
        if self.credit >= price:
            self.credit = 0.0
            self._countdown, self._on_trial = TRIAL, sequence
            sequence.num_drafts = sequence.draft_limit


def _set_drafts(sequences: Seq[Sequence], num_drafts: int | None) -> None:
    """None stands for as many as there may be."""
    for sequence in sequences:
        sequence.num_drafts = sequence.draft_limit if num_drafts is None else num_drafts
