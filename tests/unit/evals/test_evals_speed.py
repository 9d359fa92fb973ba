"""The speed comparison: what is compared, in which order, and whether the texts agree. No clock is judged."""

from __future__ import annotations

import dataclasses

import pytest

from openmimo.config.model import ModelConfig
from openmimo.engine import Completion, Engine
from openmimo.errors import RequestError
from openmimo.evals import measure_draft_speed, speed
from openmimo.model import build_model


class Clock:
    """Advances by what the engine last did: 1 s per call, and 2 s more for each token after the first."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_ways_take_turns_and_prompts_are_taken_off(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches A A B B order, prompt time counted as decoding, and a baseline that still drafts or pads."""
    clock, turns = Clock(), []
    genuine = Engine.generate

    def generate(self: Engine, prompts, params=None) -> list[Completion]:
        done = genuine(self, prompts, params)
        if params.max_tokens > 1 and len(prompts) > 1:
            turns.append(self.draft_heads)
        seconds_per_token = 1.0 if self.draft_heads else 2.0
        clock.now += 1.0 + seconds_per_token * sum(len(each.token_ids) - 1 for each in done)
        return done

    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(speed, "time", clock)
    report = measure_draft_speed(Engine(build_model(tiny_config)), [[1, 2], [3]], max_tokens=5, num_rounds=2)
    assert turns == [0, 3] * 2
    assert (report.plain_tokens_per_s, report.draft_tokens_per_s, report.speedup) == (0.5, 1.0, 2.0)
    assert (report.num_prompts, report.num_tokens, report.num_rounds) == (2, 10, 2)
    assert report.identical


def test_different_texts_are_noticed(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison of a list with itself."""
    genuine = Engine.generate

    def generate(self: Engine, prompts, params=None) -> list[Completion]:
        done = genuine(self, prompts, params)
        return [dataclasses.replace(each, token_ids=(self.draft_heads, *each.token_ids[1:])) for each in done]

    monkeypatch.setattr(Engine, "generate", generate)
    assert not measure_draft_speed(Engine(build_model(tiny_config)), [[1]], max_tokens=9, num_rounds=1).identical


def test_nothing_to_compare_is_refused(tiny_config: ModelConfig) -> None:
    engine = Engine(build_model(tiny_config), draft_heads=0)
    with pytest.raises(RequestError, match="draft_heads=0"):
        measure_draft_speed(engine, [[1]])
    with pytest.raises(RequestError, match="0 prompts"):
        measure_draft_speed(engine.with_drafts("auto"), [])
