"""A table for a model, the options of sampling, and the exact probabilities of whole short answers under them.

The probabilities come from the definitions of the options, worked out answer by answer in plain Python.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from fake_runner import FakeRunner

from openmimo.engine import SamplingParams, StepInput, StepOutput
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
    """Logits depend on the last token alone, so there is no cache; drafts are the most probable tokens.

    What a larger vocabulary has beyond the table is never written.
    """

    def forward(self, step: StepInput) -> StepOutput:
        routes = np.zeros((len(step.token_ids_N), 0, 0), np.uint8)
        last_M = step.token_ids_N[step.logits_M]
        logits_MV = np.full((len(last_M), self.config.vocab_size), -1e9, np.float32)
        logits_MV[:, :VOCAB] = TABLE[last_M]
        return StepOutput(logits_MV=logits_MV, routed_experts_NLk=routes)

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


def assert_exact(answers: Sequence[Iterable[int]], params: SamplingParams) -> None:
    """Whether the answers to PROMPT are drawn from the exact distribution: p > 0.01, corrected for many tests."""
    cells = list(itertools.product(range(VOCAB), repeat=LENGTH))
    expected: list[float] = []
    for cell in cells:
        probability = float(len(answers))
        for place, token in enumerate(cell):
            probability *= token_probabilities(params, cell[:place])[token]
        expected.append(probability)
    counts = Counter(tuple(answer) for answer in answers)
    assert counts.keys() <= set(cells)
    assert math.isclose(sum(expected), len(answers), rel_tol=1e-6)
    assert not any(counts[cell] for cell, e in zip(cells, expected, strict=True) if e == 0.0)
    assert chi_square_z([counts[cell] for cell in cells], expected) < 3.3
