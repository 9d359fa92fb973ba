"""A request has one answer, to the last bit of its log-probabilities, whatever else the engine is doing."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from pathlib import Path

import numpy as np

from openmimo.engine import Completion, Engine, SamplingParams
from proofs.identity import make_prompts

NUM_WATCHED, NUM_TOKENS = 12, 96
# What a batch-invariant engine gives up would be measured against one that is not; there is none here.
COST = "always on: the kernels have one order of summation (docs/decisions/0006), so there is no faster mode to pay for"

OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.05, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.1},
)


def prove_determinism(folder: Path, *, trials: int, weights: str, threads: int) -> dict[str, object]:
    """Answer the same requests in `trials` different ways; the figures, of which `failures` is the verdict."""
    started, prompts = time.perf_counter(), make_prompts(NUM_WATCHED, seed=1)
    outputs: list[set[bytes]] = [set() for _ in prompts]
    preemptions = cached_tokens = answers = steps = 0
    for trial in range(trials):
        rng = random.Random(f"trial {trial}")
        engine = _open(folder, rng, weights=weights, threads=threads)
        done, num_steps = _answer(engine, prompts, rng)
        for index, completion in done:
            outputs[index].add(_digest(completion))
            cached_tokens += completion.num_cached_tokens
        answers, steps = answers + len(done), steps + num_steps
        preemptions += engine._core.scheduler.num_preemptions
        if trial % 20 == 19:
            print(f"{trial + 1}/{trials} trials, {preemptions} preemptions", file=sys.stderr, flush=True)
    unique = max(map(len, outputs))
    print(f"{answers} answers to {NUM_WATCHED} requests: at most {unique} different outputs to one of them")
    return {
        "failures": sum(len(each) != 1 for each in outputs),
        "unique_outputs": unique,
        "trials": trials,
        "answers": answers,
        "engine_steps": steps,
        "preemptions": preemptions,
        "cached_tokens": cached_tokens,
        "weights": weights,
        "batch_invariance": COST,
        "seconds": time.perf_counter() - started,
    }


def _open(folder: Path, rng: random.Random, *, weights: str, threads: int) -> Engine:
    """An engine with options of its own; half of them have so few pages that sequences stop each other."""
    batch = rng.choice((1, 2, 5, 13, 32))
    return Engine(
        folder,
        runner="native",
        weights=weights,
        draft_heads=rng.choice((0, 1, 2, 3, "auto")),
        max_batch=batch,
        step_tokens=max(batch, rng.choice((7, 33, 128, 300))),
        chunk_tokens=rng.choice((None, 3, 16, 50)),
        cache_tokens=rng.choice((320, 640, None, None)),
        prefix_cache_bytes=rng.choice((0, 200_000, 64 << 20)),
        snapshot_tokens=rng.choice((16, 40, 512)),
        threads=rng.randint(1, threads),
    )


def _answer(engine: Engine, prompts: list[list[int]], rng: random.Random) -> tuple[list[tuple[int, Completion]], int]:
    """Every prompt twice, in any order, among others that come and go. Returns answers by prompt, and the steps."""
    queue = [*range(len(prompts)), *range(len(prompts))]
    rng.shuffle(queue)
    asked: dict[int, int] = {}
    strangers: list[int] = []
    done: list[tuple[int, Completion]] = []
    steps = 0
    while queue or engine.has_work:
        if queue and rng.random() < 0.3:
            index = queue.pop()
            options = OPTIONS[index % len(OPTIONS)]
            params = SamplingParams(
                max_tokens=NUM_TOKENS, ignore_eos=True, seed=index, logprobs=True, routed_experts=True, **options
            )
            asked[engine.add_request(prompts[index], params)] = index
        if queue and rng.random() < 0.1:
            other = [rng.randrange(256) for _ in range(rng.randint(1, 150))]
            params = SamplingParams(max_tokens=rng.randint(1, 80), temperature=rng.choice((0.0, 1.0)), seed=0)
            strangers.append(engine.add_request(other, params))
        if strangers and rng.random() < 0.05:
            engine.abort(strangers.pop())
        for event in engine.step():
            if event.completion is not None and event.request_id in asked:
                done.append((asked[event.request_id], event.completion))
        steps += 1
    return done, steps


def _digest(completion: Completion) -> bytes:
    """Of tokens, routes and every bit of the log-probabilities."""
    assert completion.routed_experts is not None
    assert completion.logprobs is not None
    digest = hashlib.blake2b(repr(completion.token_ids).encode())
    digest.update(np.array(completion.logprobs, np.float64).tobytes())
    digest.update(completion.routed_experts.tobytes())
    return digest.digest()
