"""The measurements of `openmimo bench`: this package's engine and its peers in turns, each figure beside its limit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median

from openmimo.config.model import ModelConfig
from openmimo.errors import RequestError
from openmimo.evals.bench_limits import Limits
from openmimo.evals.bench_process import TargetProcess
from openmimo.evals.bench_target import BenchTarget, Drafts, Generation, TargetSpec
from openmimo.evals.measuring import reported_in_turns, spread

# Every turn begins with work that is not timed: another engine has filled the caches, and this one's threads slept.
WARM_STEPS, WARM_TOKENS = 8, 128
LIMIT = "limit"
REST = 0.05  # seconds behind a reading of memory, whose threads look for more work for a while

Targets = Mapping[str, BenchTarget]


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One target at one shape of work. `seconds` has every round; the rate is that of their median.

    `limit_tokens_per_s` is None where the work has no simple limit; `share_of_limit` is the median over the rounds,
    each beside the limit of that round. `details` holds figures of one measurement only.
    """

    target: str
    settings: str
    work: str
    tokens_per_s: float
    spread: float
    limit_tokens_per_s: float | None
    share_of_limit: float | None
    seconds: tuple[float, ...]
    details: Mapping[str, float]

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "details": dict(self.details)}


@contextmanager
def open_targets(specs: Sequence[TargetSpec]) -> Generator[dict[str, TargetProcess]]:
    """All targets, each in a process of its own, closed at the end. Raises: RequestError."""
    with ExitStack() as stack:
        targets: dict[str, TargetProcess] = {}
        for spec in specs:
            targets[spec.kind] = TargetProcess(spec)
            stack.callback(targets[spec.kind].close)
        yield targets


def random_tokens(rng: random.Random, vocab_size: int, *shape: int) -> list[list[int]]:
    """Rows of token ids, each its own."""
    rows, columns = shape
    return [[rng.randrange(vocab_size) for _ in range(columns)] for _ in range(rows)]


def bench_prefill(
    targets: Targets, config: ModelConfig, limits: Limits, *, lengths: Sequence[int], rounds: int, seed: int = 0
) -> list[BenchRow]:
    """Tokens per second of one prompt of each length, from an empty cache to its last token's logits."""
    rows: list[BenchRow] = []
    for length in lengths:
        [prompt] = random_tokens(random.Random(seed), config.vocab_size, 1, length)
        arms = {name: _prefill_arm(target, prompt) for name, target in targets.items()}
        seconds = reported_in_turns(arms, rounds)
        limit_seconds = [length / limits.prefill_tokens_per_s(length)] * rounds
        rows += _rows(targets, f"prompt {length}", seconds, length, limit_seconds)
    return rows


def bench_decode(
    targets: Targets,
    config: ModelConfig,
    limits: Limits,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    num_steps: int,
    rounds: int,
    seed: int = 0,
) -> list[BenchRow]:
    """Tokens per second of all sequences together; every round begins anew with prompts of `context` tokens.

    The memory, and with it the limit, takes turns with the targets.
    """
    rows: list[BenchRow] = []
    rng = random.Random(seed)
    for batch in batches:
        for context in contexts:
            prompts = random_tokens(rng, config.vocab_size, batch, context)
            steps = WARM_STEPS + num_steps
            plan = [random_tokens(rng, config.vocab_size, steps, batch) for _ in range(rounds + 1)]
            arms = {name: _decode_arm(target, prompts, plan) for name, target in targets.items()}
            middle = context + steps - num_steps // 2
            num_tokens = batch * num_steps

            def limit_arm(batch: int = batch, middle: int = middle, num_tokens: int = num_tokens) -> float:
                seconds = num_tokens / limits.decode_tokens_per_s(batch, middle)
                time.sleep(REST)
                return seconds

            seconds = reported_in_turns({LIMIT: limit_arm, **arms}, rounds)
            rows += _rows(targets, f"batch {batch}, context {context}", seconds, num_tokens, seconds[LIMIT])
    return rows


def bench_mtp(
    targets: Targets,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    batches: Sequence[int],
    num_tokens: int,
    num_drafts: int,
    rounds: int,
) -> list[BenchRow]:
    """Greedy decoding with and without drafts of the first prompts of each group, in turns. Prompts are in the time.

    llama.cpp drafts at batch 1 only. `details` has the acceptance length, and whether the text is that of this row's
    target without drafts: rounding may resolve a near tie differently in a wider step.
    """
    if not all(len(group) >= max(batches) for group in prompts.values()):
        raise RequestError(f"there are fewer prompts than the largest batch, {max(batches)}; give more of them")
    rows: list[BenchRow] = []
    for domain, group in prompts.items():
        for batch in batches:
            last: dict[str, Generation] = {}
            settings: dict[str, str] = {}

            def arm(name: str, drafts: Drafts, batch: int = batch, group: Sequence[Sequence[int]] = group) -> float:
                key = f"{name}, {drafts} drafts" if drafts else name
                targets[name].generate(group[:batch], WARM_STEPS, num_drafts=drafts)
                last[key] = targets[name].generate(group[:batch], num_tokens, num_drafts=drafts)  # noqa: B023
                settings[key] = targets[name].settings  # noqa: B023
                return last[key].seconds  # noqa: B023

            arms: dict[str, Callable[[], float]] = {}
            for name in targets:
                arms[name] = lambda name=name: arm(name, 0)
                if num_drafts and (name != "llama.cpp" or batch == 1):
                    arms[f"{name}, {num_drafts} drafts"] = lambda name=name: arm(name, num_drafts)
                if num_drafts and name == "openmimo":
                    arms[f"{name}, auto drafts"] = lambda name=name: arm(name, "auto")
            seconds = reported_in_turns(arms, rounds)
            for key, values in seconds.items():
                plain = last[key.partition(",")[0]]
                details = {
                    "acceptance_length": last[key].draft.acceptance_length,
                    "same_text": float(last[key].token_ids == plain.token_ids),
                }
                work = f"{domain}, batch {batch}"
                rows.append(_row(key, settings[key], work, values, batch * num_tokens, None, details))
    return rows


def bench_load(specs: Sequence[TargetSpec], config: ModelConfig, *, rounds: int, seed: int = 0) -> list[BenchRow]:
    """Seconds from opening the files to the first token of a prompt of 16, and the process's peak memory.

    Each round starts new processes, with the files in the operating system's cache after the first. The start of
    Python and its imports do not count, and no target looks for its best settings.
    """
    [prompt] = random_tokens(random.Random(seed), config.vocab_size, 1, 16)
    peaks: dict[str, float] = {}

    def load(spec: TargetSpec) -> float:
        target = TargetProcess(replace(spec, probe=False))
        try:
            seconds = target.load_seconds + target.prefill(prompt)
            peaks[spec.kind] = target.peak_bytes
            return seconds
        finally:
            target.close()

    seconds = reported_in_turns({spec.kind: lambda spec=spec: load(spec) for spec in specs}, rounds)
    return [_row(name, "", "load", values, 1, None, {"peak_bytes": peaks[name]}) for name, values in seconds.items()]


def _prefill_arm(target: BenchTarget, prompt: Sequence[int]) -> Callable[[], float]:
    def turn() -> float:
        target.prefill(prompt[:WARM_TOKENS])
        return target.prefill(prompt)

    return turn


def _decode_arm(
    target: BenchTarget, prompts: Sequence[Sequence[int]], plan: Sequence[Sequence[Sequence[int]]]
) -> Callable[[], float]:
    steps_left = iter(plan)

    def turn() -> float:
        steps = next(steps_left)
        target.start(prompts, room=len(steps))
        target.decode(steps[:WARM_STEPS])
        return target.decode(steps[WARM_STEPS:])

    return turn


def _rows(
    targets: Targets, work: str, seconds: Mapping[str, Sequence[float]], num_tokens: int, limit: Sequence[float]
) -> list[BenchRow]:
    return [_row(name, target.settings, work, seconds[name], num_tokens, limit, {}) for name, target in targets.items()]


def _row(
    name: str,
    settings: str,
    work: str,
    seconds: Sequence[float],
    num_tokens: int,
    limit: Sequence[float] | None,
    details: Mapping[str, float],
) -> BenchRow:
    """`limit` has seconds, round by round like `seconds`."""
    shares = None if limit is None else [least / taken for least, taken in zip(limit, seconds, strict=True)]
    return BenchRow(
        target=name,
        settings=settings,
        work=work,
        tokens_per_s=num_tokens / median(seconds),
        spread=spread(seconds),
        limit_tokens_per_s=None if limit is None else num_tokens / median(limit),
        share_of_limit=None if shares is None else median(shares),
        seconds=tuple(seconds),
        details=details,
    )
