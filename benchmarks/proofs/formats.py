"""Logits of every runner, weight format and instruction set beside a float64 twin of the model."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common import print_table
from openmimo import tasks
from openmimo.checkpoint import load_model
from openmimo.engine.loading import TORCH_WEIGHTS, RunnerOptions, load_tokenizer, open_runner
from openmimo.engine.native_runner import KERNELS_VARIABLE, WEIGHTS, load_extension
from openmimo.engine.runner import PAGE_TOKENS, Runner, StepInput
from openmimo.text import ChatTemplate, Tokenizer
from proofs.small_model import DOMAINS, problem_text

sys.path.append(str(Path(__file__).parents[2] / "tests" / "unit" / "model"))
from model_oracle import Oracle

FP32_BAR = 1e-5  # greatest difference of logits of order 1
KL_BARS = {"int8": 1e-3}  # nats, mean over tokens
TEXT_TOKENS, STEP = 200, 5

Logits = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ForwardPath:
    """A runner, its weights and, for the native one, its table of kernels and what else is in 8 bits."""

    runner: str
    weights: str
    kernels: str = ""
    activations: str = "auto"
    cache: str = "auto"

    def __str__(self) -> str:
        others = (("activations", self.activations), ("cache", self.cache))
        extra = [f"+ {value} {name}" for name, value in others if value != "auto"]
        return " ".join(filter(None, (self.runner, self.kernels, self.weights, *extra)))

    @property
    def bar(self) -> float:
        """Of the mean KL: what else is in 8 bits is reported only."""
        return KL_BARS.get(self.weights, np.inf) if self.activations == self.cache == "auto" else np.inf


@dataclass(frozen=True)
class Job:
    path: ForwardPath
    folder: Path
    texts: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """A path beside the reference, `share` being `difference` over the greatest logit; KL(reference || path)."""

    path: ForwardPath
    difference: float
    share: float
    mean_kl: float
    mean_kl_error: float
    median_kl: float
    num_tokens: int

    @classmethod
    def of(cls, path: ForwardPath, expected_NV: Logits, found_NV: Logits) -> Comparison:
        p_NV, q_NV = log_softmax(expected_NV), log_softmax(found_NV)
        kl_N = (np.exp(p_NV) * (p_NV - q_NV)).sum(-1)
        difference = float(np.abs(expected_NV - found_NV).max())
        share = difference / float(np.abs(expected_NV).max())
        error = float(kl_N.std()) / len(kl_N) ** 0.5
        return cls(path, difference, share, float(kl_N.mean()), error, float(np.median(kl_N)), len(kl_N))

    @property
    def row(self) -> tuple[object, ...]:
        return (self.path, self.difference, self.share, self.mean_kl, self.mean_kl_error, self.median_kl)

    @property
    def record(self) -> dict[str, object]:
        return {**vars(self), "path": str(self.path)}


def all_paths() -> list[ForwardPath]:
    """Everything this machine can run."""
    kernels = load_extension().available_kernels()
    native = [ForwardPath("native", weights, name) for weights in WEIGHTS for name in kernels]
    return [*(ForwardPath("torch", weights) for weights in TORCH_WEIGHTS), *native]


def prove_formats(trained: Path, random: Path, *, num_tokens: int, processes: int) -> dict[str, object]:
    """All paths on held-out text of a trained model, and the float32 ones on a random model with logits of order 1.

    Figures, of which `failures` is the verdict. Trained logits reach 20 and more, where neighbours in float32 are 2e-6
    apart, so there the bar is a share of the greatest logit. A few tokens that go to other experts make up most of a
    divergence, so the narrow formats' bars want many tokens: the fastest kernels read `num_tokens`, all others a tenth.
    """
    started = time.perf_counter()
    paths, fastest = all_paths(), load_extension().available_kernels()[-1]
    exact = [path for path in paths if path.weights == "float32"]
    narrow = [path for path in paths if path.weights != "float32" and path.kernels == fastest]
    for weights, activations, cache in (
        ("int8", "int8", "auto"),
        ("int8_block", "int8", "auto"),
        ("bf16", "auto", "int8"),
        ("int8", "int8", "int8"),
    ):
        narrow.append(ForwardPath("native", weights, fastest, activations, cache))
    others = [path for path in paths if path not in narrow]
    order_one = compare(random, exact, num_tokens=num_tokens // 40, processes=processes)
    short = compare(trained, others, num_tokens=num_tokens // 10, processes=processes)
    long = compare(trained, narrow, num_tokens=num_tokens, processes=processes)
    # No number at all is a failure too.
    failures = [f"random model, {each.path}" for each in order_one if not each.difference <= FP32_BAR]
    failures += [str(each.path) for each in short if each.path in exact and not each.share <= FP32_BAR]
    failures += [str(each.path) for each in long if not each.mean_kl <= each.path.bar]
    results = {"random_model": order_one, "trained_model": short, "trained_model_long": long}
    for name, comparisons in results.items():
        print(f"{name.replace('_', ' ')}, {comparisons[0].num_tokens:,} tokens")
        header = ("path", "difference", "of the greatest logit", "mean KL", "standard error", "median KL")
        print_table(header, [each.row for each in comparisons])
    return {
        "failures": failures,
        **{name: [each.record for each in comparisons] for name, comparisons in results.items()},
        "bars": {"float32": FP32_BAR, "kl": KL_BARS},
        "seconds": time.perf_counter() - started,
    }


def compare(folder: Path, paths: Sequence[ForwardPath], *, num_tokens: int, processes: int) -> list[Comparison]:
    """Each path in a process of its own, because its environment chooses the kernels."""
    texts, context = make_texts(folder, num_tokens), multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes of the pools, which share the cores
    with context.Pool(processes) as pool:
        expected = pool.map(_reference, [(folder, text) for text in texts], chunksize=1)
    found: list[Comparison] = []
    with context.Pool(processes, maxtasksperchild=1) as pool:
        for path, logits in zip(
            paths, pool.imap(_logits, [Job(path, folder, texts) for path in paths], chunksize=1), strict=True
        ):
            found.append(Comparison.of(path, np.concatenate(expected), np.concatenate(logits)))
            print(f"{path}: {found[-1].row[1:]}", file=sys.stderr, flush=True)
    return found


def log_softmax(logits_NV: Logits) -> Logits:
    shifted_NV = logits_NV - logits_NV.max(-1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(-1, keepdims=True))


def make_texts(folder: Path, num_tokens: int) -> list[list[int]]:
    """Held-out problems with their answers, as the model was trained to read them.

    One chat after the other, each a text of its own; for a model without a tokenizer bytes, problem behind problem.
    """
    tokenizer, texts = load_tokenizer(folder), []
    problems = count()
    while sum(map(len, texts)) < num_tokens:
        ids: list[int] = []
        if isinstance(tokenizer, Tokenizer):
            index = next(problems)
            domain = DOMAINS[index % len(DOMAINS)]
            problem = tasks.sample_problem(domain, split="test", level=1, seed=1, index=index)
            question = {"role": "user", "content": problem.prompt}
            answer = {"role": "assistant", "content": problem.solution}
            ids += ChatTemplate(tokenizer).render_training([question, answer])[0]
        else:
            while len(ids) < TEXT_TOKENS:
                ids += problem_text(next(problems), split="test", seed=1).encode()
        texts.append(ids[:TEXT_TOKENS])
    return texts


def _reference(work: tuple[Path, list[int]]) -> Logits:
    folder, ids = work
    oracle = Oracle(load_model(folder, dtype="float32"))
    return oracle.forward(ids, range(len(ids)), [0] * len(ids)).logits_TV


def _logits(job: Job) -> list[Logits]:
    """In a process of its own."""
    os.environ[KERNELS_VARIABLE] = job.path.kernels
    options = RunnerOptions(
        kind=job.path.runner,
        weights=job.path.weights,
        activations=job.path.activations,
        cache=job.path.cache,
        verify=False,
        max_batch=1,
        step_tokens=TEXT_TOKENS,
        cache_tokens=TEXT_TOKENS,
        prefix_cache_bytes=0,
        threads=1,
    )
    runner = open_runner(job.folder, options)
    assert job.path.kernels in ("", getattr(runner, "kernels", ""))
    return [_feed(runner, ids) for ids in job.texts]


def _feed(runner: Runner, ids: list[int]) -> Logits:
    """Logits after every token: half of the text as a prompt, the rest in the short steps of an answer with drafts."""
    table = np.arange(-(-TEXT_TOKENS // PAGE_TOKENS), dtype=np.int32)
    row, half, start, found = np.zeros(1, np.int32), len(ids) // 2, 0, []
    while start < len(ids):
        size = half if start == 0 else min(STEP, len(ids) - start)
        step = StepInput(
            token_ids_N=np.array(ids[start : start + size], np.int32),
            rows_S=row,
            starts_S=np.array([start], np.int32),
            counts_S=np.array([size], np.int32),
            page_tables=(table,),
            logits_M=np.arange(size, dtype=np.int32),
        )
        found.append(runner.forward(step).logits_MV.astype(np.float64))
        runner.commit(row, np.array([size], np.int32))
        start += size
    return np.concatenate(found)
