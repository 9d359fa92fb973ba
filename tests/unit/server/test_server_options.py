"""Sampling options over HTTP, drafts or not: answers have their exact probability (chi-square over whole answers)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_fakes import LiveServer, serving

from openmimo.engine import Engine, SamplingParams
from openmimo.text import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from exact_cases import DRAWS, LENGTH, OPTIONS, PROMPT, TableRunner, assert_exact

CHOICES = 100


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> Iterator[LiveServer]:
    runner = TableRunner(num_rows=32, num_pages=64, max_step_tokens=256, vocab_size=tokenizer.vocab_size)
    engine = Engine(runner, max_batch=32, step_tokens=256, prefix_cache_bytes=0, tokenizer=tokenizer)
    with serving(engine, model_name="table") as server:
        yield server


def answers(server: LiveServer, route: str, body: dict[str, Any]) -> list[list[int]]:
    """Token ids of enough answers."""
    found: list[list[int]] = []
    for seed in range(DRAWS // LENGTH // CHOICES):
        answer = server.post(route, {**body, "seed": seed})
        assert answer.status_code == 200, answer.text
        found += [choice["token_ids"] for choice in answer.json()["choices"]]
    return found


@pytest.mark.parametrize("draft_heads", [0, 3])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_answers_have_their_exact_probability(table: LiveServer, name: str, draft_heads: int) -> None:
    """Catches an option that is lost, renamed or rounded on its way, and choices that are not independent."""
    wishes = {key: value for key, value in OPTIONS[name].items() if key != "logit_bias"}
    bias = {str(token): value for token, value in OPTIONS[name].get("logit_bias", {}).items()}
    body = {
        "prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, "n": CHOICES, "draft_heads": draft_heads,
        "return_token_ids": True, "top_p": 1.0, "logit_bias": bias, **wishes,
    }  # fmt: skip
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **OPTIONS[name])
    assert_exact(answers(table, "/v1/completions", body), params)
