"""Sampled answers follow the target distribution exactly, drafts or not: chi-square over whole short answers.

The expected probabilities come from the definitions of the options, worked out answer by answer in plain Python.
"""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest
from fake_runner import FakeRunner

from openmimo.engine import Engine, SamplingParams, StepInput, StepOutput
from openmimo.engine.runner import Int32

VOCAB, LENGTH, PROMPT = 5, 3, [3, 1]
# OPENMIMO_EXACT_DRAWS=1000000 is the full count, for every option with and without drafts.
DRAWS = int(os.environ.get("OPENMIMO_EXACT_DRAWS", "9000"))
TABLE = (np.random.default_rng(4).normal(size=(VOCAB, VOCAB)) * 1.5).astype(np.float32)

OPTIONS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.15},
    "presence": {"temperature": 1.0, "presence_penalty": 1.1},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.9},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.6},
    "bias": {"temperature": 1.0, "logit_bias": {0: 1.5, 4: -1.0}},
    "all": {
        "temperature": 0.9,
        "top_k": 4,
        "top_p": 0.95,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {2: 0.5},
    },
}


class TableRunner(FakeRunner):
    """Logits depend on the last token alone, so there is no cache; drafts are the most probable tokens."""

    def forward(self, step: StepInput) -> StepOutput:
        routes = np.zeros((len(step.token_ids_N), 0, 0), np.uint8)
        return StepOutput(logits_MV=TABLE[step.token_ids_N[step.logits_M]], routed_experts_NLk=routes)

    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        pass

    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        pass

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        likeliest = TABLE.argmax(axis=1)
        drafts = [likeliest[tokens_SW[:, -1]]]
        for _ in range(2):
            drafts.append(likeliest[drafts[-1]])
        return np.stack(drafts, axis=1).astype(np.int32)


def token_probabilities(params: SamplingParams, answer: tuple[int, ...]) -> list[float]:
    """The distribution of the token after the prompt and `answer`, by the definitions."""
    logits = [float(x) for x in TABLE[(*PROMPT, *answer)[-1]]]
    for token in {*PROMPT, *answer}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in range(VOCAB):
        count = answer.count(token)
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token] += params.logit_bias.get(token, 0.0)
    weights = [math.exp(x / params.temperature) for x in logits]
    ranked = sorted(range(VOCAB), key=lambda token: -weights[token])
    kept = ranked[: params.top_k or VOCAB]
    total, before, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if before < params.top_p * total:
            nucleus.append(token)
        before += weights[token]
    nucleus = [token for token in nucleus if weights[token] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(VOCAB)]


def chi_square_z(counts: list[int], expected: list[float]) -> float:
    """The normal deviate of Pearson's statistic (Wilson and Hilferty), rare cells taken together."""
    pairs = sorted(zip(expected, counts, strict=True), reverse=True)
    cells = [pair for pair in pairs if pair[0] >= 5]
    rest = [pair for pair in pairs if pair[0] < 5]
    if sum(e for e, _ in rest) >= 5:
        cells.append((sum(e for e, _ in rest), sum(c for _, c in rest)))
    statistic, degrees = sum((count - e) ** 2 / e for e, count in cells), len(cells) - 1
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


@pytest.mark.parametrize("draft_heads", [0, 3])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_whole_answers_have_their_exact_probability(name: str, draft_heads: int) -> None:
    """Catches drafts that favour the probable token, and any option applied wrongly, late or twice."""
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=11, **OPTIONS[name])
    runner = TableRunner(num_rows=32, num_pages=64, max_step_tokens=256, vocab_size=VOCAB)
    engine = Engine(runner, draft_heads=draft_heads, max_batch=32, step_tokens=256, prefix_cache_bytes=0)
    number = DRAWS // LENGTH
    answers = [done.token_ids for done in engine.generate([PROMPT] * number, params)]
    cells = list(itertools.product(range(VOCAB), repeat=LENGTH))
    expected = []
    for cell in cells:
        probability = float(number)
        for place, token in enumerate(cell):
            probability *= token_probabilities(params, cell[:place])[token]
        expected.append(probability)
    counts = {cell: 0 for cell in cells}
    for answer in answers:
        counts[answer] += 1
    assert sum(expected) == pytest.approx(number)
    assert not any(counts[cell] for cell, e in zip(cells, expected, strict=True) if e == 0.0)
    # p > 0.01 after correction for the number of tests
    assert chi_square_z(list(counts.values()), expected) < 3.3
