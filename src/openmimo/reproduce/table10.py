"""The report's Table 10 in small: what drafting speeds decoding up by, over batch and acceptance length.

Acceptance lengths are set exactly by drafts replayed from the text (`ReplayRunner`); the model's own heads, on prompts
of each domain, stand beside them. The clock runs while all answers of a batch are being written: from the end of the
prompts to the step that brings the first answer to the wanted number of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from openmimo.engine import PAGE_TOKENS, Engine, SamplingParams, resolve_model_folder
from openmimo.engine.loading import RunnerOptions, open_runner
from openmimo.errors import RequestError
from openmimo.evals.measuring import print_table, reported_in_turns, spread
from openmimo.reproduce.replay_drafts import ReplayRunner, head_acceptance

# From the report: per node, on GPUs; the least and the greatest of the table, and two of its cells (batch, acceptance).
REPORT_LEAST, REPORT_GREATEST = 1.82, 2.70
REPORT_CELLS = ((64, 3.6, 2.53), (96, 3.8, 2.70))
MIXED = "mixed"

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class SpeedCell:
    """One batch with one kind of drafts, against the same batch without any. The speed-up is that of the medians.

    `wanted` is the acceptance length that was set; None: the heads' own drafts, on prompts of the domain `prompts`.
    """

    batch: int
    prompts: str
    wanted: float | None
    acceptance_length: float
    plain_tokens_per_s: float
    draft_tokens_per_s: float
    spread: float

    @property
    def speedup(self) -> float:
        return self.draft_tokens_per_s / self.plain_tokens_per_s


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Tokens that the timed steps gave, the answers' turns in them, and their seconds."""

    num_tokens: int
    num_turns: int
    seconds: float


class DecodeClock:
    """Times decoding of whole batches on one runner, with no drafts, the heads' own or replayed ones."""

    def __init__(
        self,
        model: str | Path,
        prompts: Mapping[str, Prompts],
        *,
        runner: str,
        weights: str,
        threads: int,
        num_tokens: int,
    ) -> None:
        longest = max(len(prompt) for group in prompts.values() for prompt in group)
        batch = max(map(len, prompts.values()))
        options = RunnerOptions(
            kind=runner,
            weights=weights,
            verify=False,
            max_batch=batch,
            step_tokens=batch * longest,  # all prompts fit one step, so that answers start together
            # A page more, because texts reach a little further than what is timed.
            cache_tokens=batch * (-(-(longest + num_tokens) // PAGE_TOKENS) + 1) * PAGE_TOKENS,
            prefix_cache_bytes=0,
            threads=threads,
        )
        self.runner = ReplayRunner(open_runner(resolve_model_folder(model), options))
        self.num_heads = self.runner.config.num_mtp_heads
        if self.num_heads == 0:
            raise RequestError(f"{model} has no MTP heads, so there is nothing to speed up; train some (`mtp_heads`)")
        self.engine = Engine(
            self.runner, max_batch=batch, step_tokens=batch * longest, prefix_cache_bytes=0, draft_heads=0
        )
        self.num_tokens = num_tokens
        # An answer's limit cuts its last drafts short, so it lies behind what is timed.
        self.limit = num_tokens + 2 * (self.num_heads + 1)

    def texts(self, prompts: Prompts) -> list[list[int]]:
        """Prompts and what the model writes to them, beyond the limit by as much as drafts may reach."""
        self.runner.begin((), None)
        params = SamplingParams(max_tokens=self.limit + self.num_heads + 1, ignore_eos=True)
        done = self.engine.generate(prompts, params)
        return [[*prompt, *completion.token_ids] for prompt, completion in zip(prompts, done, strict=True)]

    def decode(self, prompts: Prompts, texts: Prompts, *, num_drafts: int, head_share: float | None) -> _Pass:
        """Write answers to all prompts until one of them has `num_tokens` tokens."""
        self.runner.begin(texts, head_share)
        engine = self.engine.with_drafts(num_drafts)
        params = SamplingParams(max_tokens=self.limit, ignore_eos=True)
        written = {engine.add_request(prompt, params): 1 for prompt in prompts}
        engine.step()
        num_turns = 0
        began = perf_counter()
        while max(written.values()) < self.num_tokens:
            events = engine.step()
            num_turns += len(events)
            for event in events:
                written[event.request_id] += len(event.token_ids)
        seconds = perf_counter() - began
        for request in written:
            engine.abort(request)
        return _Pass(num_tokens=sum(written.values()) - len(written), num_turns=num_turns, seconds=seconds)


def measure_table10(
    clock: DecodeClock,
    prompts: Mapping[str, Prompts],
    *,
    batches: Sequence[int],
    acceptance_lengths: Sequence[float],
    rounds: int,
) -> list[SpeedCell]:
    """For every batch: the wanted acceptance lengths on prompts of all groups in turn, then each group's own drafts.

    Every kind takes turns with no drafts on the same prompts. Raises: RequestError on an impossible acceptance length,
    or too few prompts for the largest batch.
    """
    if any(len(group) < max(batches) for group in prompts.values()):
        raise RequestError(f"a group has fewer prompts than the largest batch, {max(batches)}; give more of them")
    shares: dict[float | None, float | None] = {
        wanted: head_acceptance(wanted, clock.num_heads) for wanted in acceptance_lengths
    }
    mixed = [prompt for same_place in zip(*prompts.values(), strict=False) for prompt in same_place]
    cells: list[SpeedCell] = []
    for batch in batches:
        cells += _compare(clock, batch, MIXED, mixed[:batch], shares, rounds)
        for name, group in prompts.items():
            cells += _compare(clock, batch, name, group[:batch], {None: None}, rounds)
    return cells


def print_table10(cells: Sequence[SpeedCell]) -> None:
    """Speed-ups: a line for every kind of drafts, a column for every batch; then how far rounds lay apart."""
    batches = list(dict.fromkeys(cell.batch for cell in cells))
    lines: dict[tuple[str, float | None], dict[int, SpeedCell]] = {}
    for cell in cells:
        lines.setdefault((cell.prompts, cell.wanted), {})[cell.batch] = cell
    rows: list[list[object]] = []
    for (name, wanted), line in lines.items():
        source = f"own heads, {name}" if wanted is None else f"replayed, {wanted:g}"
        measured = mean(cell.acceptance_length for cell in line.values())
        rows.append([source, f"{measured:.2f}", *(f"{line[batch].speedup:.2f}x" for batch in batches)])
    print_table(("drafts", "tokens/step", *(f"batch {batch}" for batch in batches)), rows)
    middle, worst = median(cell.spread for cell in cells), max(cell.spread for cell in cells)
    print(
        f"(greatest - least) / median of the rounds: {100 * middle:.0f}% in the median cell, {100 * worst:.0f}% at most"
    )
    cited = ", ".join(f"{gain:.2f}x at batch {batch} and {length:g}" for batch, length, gain in REPORT_CELLS)
    print(f"MiMo-V2-Flash report, per node of GPUs: {REPORT_LEAST:.2f}x to {REPORT_GREATEST:.2f}x; {cited}")


def write_table10(cells: Sequence[SpeedCell], path: Path, about: Mapping[str, object]) -> None:
    """All that the table shows, as JSON, with both speeds."""
    report = {"least": REPORT_LEAST, "greatest": REPORT_GREATEST, "cells": REPORT_CELLS}
    measured = [{**asdict(cell), "speedup": cell.speedup} for cell in cells]
    path.write_text(json.dumps({"table": 10, **about, "cells": measured, "report": report}, indent=2) + "\n")


def _compare(
    clock: DecodeClock,
    batch: int,
    name: str,
    prompts: Prompts,
    shares: Mapping[float | None, float | None],
    rounds: int,
) -> list[SpeedCell]:
    """One batch without drafts and with each kind of them, in turns."""
    texts = clock.texts(prompts)
    last: dict[str, _Pass] = {}

    def arm(key: str, num_drafts: int, share: float | None) -> float:
        last[key] = clock.decode(prompts, texts, num_drafts=num_drafts, head_share=share)
        return last[key].seconds / last[key].num_tokens

    arms = {"plain": lambda: arm("plain", 0, None)}
    for wanted, share in shares.items():
        arms[str(wanted)] = lambda key=str(wanted), share=share: arm(key, clock.num_heads, share)
    seconds = reported_in_turns(arms, rounds)
    return [
        SpeedCell(
            batch=batch,
            prompts=name,
            wanted=wanted,
            acceptance_length=last[str(wanted)].num_tokens / last[str(wanted)].num_turns,
            plain_tokens_per_s=1 / median(seconds["plain"]),
            draft_tokens_per_s=1 / median(seconds[str(wanted)]),
            spread=max(spread(seconds["plain"]), spread(seconds[str(wanted)])),
        )
        for wanted in shares
    ]
