"""Greedy tokens and routes are the same whatever the drafts, the batch, the chunks and the prefix cache."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from common import print_table
from openmimo.engine import Completion, DraftStats, Engine, SamplingParams
from proofs.small_model import problem_text

DRAFTS, BATCHES, CHUNKS, CACHES = (0, 1, 2, 3), (1, 7, 32), (9, 64), (False, True)
STEP_TOKENS = 160  # every answer of the largest batch with all drafts, and a chunk


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One way to decode."""

    drafts: int
    batch: int
    chunk_tokens: int
    cached: bool

    def __str__(self) -> str:
        cache = "cache" if self.cached else "no cache"
        return f"{self.drafts} drafts, batch {self.batch}, chunks of {self.chunk_tokens}, {cache}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one combination gave; `digests` has one entry per prompt, of its tokens and its routes."""

    combination: Combination
    digests: list[bytes]
    num_tokens: int
    cached_tokens: int
    draft: DraftStats
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Task:
    combination: Combination
    folder: Path
    weights: str
    prompts: list[list[int]]
    num_tokens: int


def combinations() -> list[Combination]:
    """All of them, the slowest first so that processes finish together. The first is plain decoding, one by one."""
    grid = product(BATCHES, CACHES, CHUNKS, DRAFTS)
    return [
        Combination(drafts=drafts, batch=batch, chunk_tokens=chunk, cached=cached)
        for batch, cached, chunk, drafts in grid
    ]


def make_prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    """Problems cut anywhere, random bytes, many with a beginning that others have, some twice."""
    rng = random.Random(seed)
    beginnings = [list(problem_text(index, split="train").encode()[:48]) for index in range(8)]
    prompts: list[list[int]] = []
    for index in range(count):
        text = list(problem_text(index, split="test").encode())
        if index % 4 == 0:
            text = [rng.randrange(256) for _ in range(80)]
        text = text[: rng.randint(1, 80)]
        if index % 3 == 0:
            text = [*rng.choice(beginnings), *text]
        prompts.append(rng.choice(prompts) if index % 10 == 9 else text)
    return prompts


def prove_identity(
    folder: Path, *, num_prompts: int, num_tokens: int, weights: str, processes: int
) -> dict[str, object]:
    """Run every combination and compare; the figures, of which `failures` is the verdict."""
    prompts = make_prompts(num_prompts)
    tasks = [
        Task(combination=each, folder=folder, weights=weights, prompts=prompts, num_tokens=num_tokens)
        for each in combinations()
    ]
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for outcome in pool.imap_unordered(_run, tasks):
            outcomes.append(outcome)
            print(f"{len(outcomes)}/{len(tasks)} {outcome.combination}: {outcome.seconds:.1f} s", file=sys.stderr)
    (plain,) = [each for each in outcomes if each.combination == combinations()[0]]
    failures = [
        f"{each.combination}: prompt {place}"
        for each in outcomes
        for place, (mine, expected) in enumerate(zip(each.digests, plain.digests, strict=True))
        if mine != expected
    ]
    print(*failures[:20], sep="\n", file=sys.stderr)
    drafting = {number: [o.draft for o in outcomes if o.combination.drafts == number] for number in DRAFTS}
    acceptance = {number: DraftStats.merge(stats).per_head for number, stats in drafting.items()}
    print_table(
        ("drafts", "combinations", "tokens", "seconds", "acceptance per head"),
        [_row(number, outcomes, acceptance[number]) for number in DRAFTS],
    )
    return {
        "failures": len(failures),
        "combinations": len(outcomes),
        "prompts": num_prompts,
        "tokens_per_prompt": num_tokens,
        "tokens": sum(outcome.num_tokens for outcome in outcomes),
        "weights": weights,
        "different_answers": len(set(plain.digests)),
        "cached_tokens": sum(outcome.cached_tokens for outcome in outcomes),
        "acceptance_per_head": acceptance,
        "seconds": time.perf_counter() - started,
    }


def _row(number: int, outcomes: Sequence[Outcome], acceptance: Sequence[float]) -> list[object]:
    mine = [outcome for outcome in outcomes if outcome.combination.drafts == number]
    shares = ", ".join(f"{share:.3f}" for share in acceptance)
    return [number, len(mine), sum(o.num_tokens for o in mine), sum(o.seconds for o in mine), shares]


def _run(task: Task) -> Outcome:
    """One combination in a process of the pool. One thread each, because the model is small."""
    combination = task.combination
    engine = Engine(
        task.folder,
        runner="native",
        weights=task.weights,
        draft_heads=combination.drafts,
        max_batch=combination.batch,
        step_tokens=STEP_TOKENS,
        chunk_tokens=combination.chunk_tokens,
        prefix_cache_bytes=(64 << 20) if combination.cached else 0,
        snapshot_tokens=16,
        threads=1,
    )
    started = time.perf_counter()
    done = engine.generate(
        task.prompts, SamplingParams(max_tokens=task.num_tokens, ignore_eos=True, routed_experts=True)
    )
    return Outcome(
        combination=combination,
        digests=[_digest(completion) for completion in done],
        num_tokens=sum(len(completion.token_ids) for completion in done),
        cached_tokens=sum(completion.num_cached_tokens for completion in done),
        draft=DraftStats.merge(completion.draft for completion in done),
        seconds=time.perf_counter() - started,
    )


def _digest(completion: Completion) -> bytes:
    assert completion.routed_experts is not None
    digest = hashlib.blake2b(repr(completion.token_ids).encode(), digest_size=16)
    digest.update(completion.routed_experts.tobytes())
    return digest.digest()
