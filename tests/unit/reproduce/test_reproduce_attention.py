"""Tables 2 and 3 in small: the arms are trained with what they are named after, and their figures are theirs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openmimo.cli.main import build_app
from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.evals.retrieval import RetrievalCell
from openmimo.reproduce import attention
from openmimo.reproduce.attention import (
    HOURLY,
    LEVELS,
    TASKS,
    Arm,
    ArmExam,
    ArmResult,
    ArmSpeed,
    AttentionReport,
    all_global,
    arms_of,
    attention_rows,
    cost_rows,
    sink_difference,
)
from openmimo.reproduce.plots import plot_attention
from openmimo.reproduce.story import DOMAINS, load_story

SHORT = [
    "long.tokenizer.train_documents=60",
    "long.tokenizer.vocab_size=400",
    "long.data.sequence_length=128",
    "long.data.batch_sequences=2",
    *(f"long.stages.{index}.steps=2" for index in range(4)),
    "long.stages.0.warmup_steps=1",
    "long.stages.0.sequence_length=64",
    "long.stages.1.sequence_length=64",
    "long.stages.3.sequence_length=256",
]


def exam(loss: float, domain: float = 0.5, recalled: float = 0.5) -> ArmExam:
    cells = tuple(
        RetrievalCell(task=task, level=level, num_tokens=1, accuracy=recalled, constant=0, num_problems=1)
        for task in TASKS
        for level in LEVELS
    )
    return ArmExam(loss=loss, domains=dict.fromkeys(DOMAINS, domain), retrieval=cells)


def report_of(exams: dict[Arm, tuple[ArmExam, ...]]) -> AttentionReport:
    arms = tuple(
        ArmResult(
            arm=arm,
            exams=each,
            speeds=tuple(
                ArmSpeed(
                    tokens=tokens,
                    cache_bytes=1000 * tokens if arm.window is None else 100 * tokens,
                    formula_bytes=1000 * tokens if arm.window is None else 100 * tokens,
                    prefill_tokens_per_s=1.0,
                    decode_tokens_per_s=1.0,
                )
                for tokens in (8, 64)
            ),
        )
        for arm, each in exams.items()
    )
    return AttentionReport(arms=arms, native_tokens=1, extended_tokens=8, seeds=(0, 1), num_problems=1, flash=(10, 50))


def test_arms_are_windows_with_and_without_sink_between_the_extremes() -> None:
    arms = arms_of([8, 16], 64)
    names = ["all global", "window 8, no sink", "window 8, sink", "window 16, no sink", "window 16, sink"]
    assert [arm.name for arm in arms] == [*names, "window 64, sink"]
    assert len({arm.slug for arm in arms}) == len(arms)
    assert arms_of([8, 16], 16) == arms[:-1]


def test_the_sink_is_compared_seed_by_seed(tmp_path: Path) -> None:
    """Catches an error that counts what the seeds have in common, and a sign the wrong way round."""
    bare, sink = Arm(window=16), Arm(window=16, sink=True)
    report = report_of(
        {
            Arm(window=None): (exam(9.0), exam(9.0)),
            bare: (exam(2.0, 0.2, 0.1), exam(4.0, 0.4, 0.3)),
            sink: (exam(1.5, 0.3, 0.4), exam(3.4, 0.6, 0.5)),
            Arm(window=64, sink=True): (exam(8.0), exam(8.0)),
        }
    )
    ((window, difference, error),) = sink_difference(report)
    assert (window, difference, error) == (16, pytest.approx(-0.55), pytest.approx(0.05))
    assert sink_difference(report, "domains")[0][1] == pytest.approx(0.15)
    assert sink_difference(report, "6")[0][1] == pytest.approx(0.25)
    rows = attention_rows(report)[1]
    assert rows[1][:3] == ["window 16, no sink", "3.0000 +-1.4142", "30.0 +-14.1"]
    assert rows[1][-1] == "20.0 +-14.1"
    costs = cost_rows(report)[1]
    assert costs[0][3] == "1.00x"
    assert costs[1][3] == costs[1][8] == "10.00x"
    plot_attention(report, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_an_hours_runs_are_the_recipe_in_fewer_steps() -> None:
    """Catches overrides that leave out a stage that the recipe has got since."""
    whole, hourly = load_story().long, load_story(HOURLY).long
    assert len(hourly.stages) == len(whole.stages)
    for long, short in zip(whole.stages, hourly.stages, strict=True):
        assert short == replace(long, steps=short.steps, mtp_heads=short.mtp_heads)
        assert short.steps < long.steps
        assert short.mtp_heads <= long.mtp_heads


def test_all_global_keeps_everything_else() -> None:
    config = ModelConfig.from_pretrained("nano")
    whole = all_global(config)
    assert set(whole.layer_kinds) == {AttentionKind.GLOBAL}
    assert replace(whole, layer_kinds=config.layer_kinds) == config


def test_the_command_trains_every_arm_as_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an arm with another's window or sink, runs that are made twice, and bytes that are not the formula's."""
    monkeypatch.setattr(attention, "SPEED_TOKENS", 512)
    options = ["--seeds", "0", "--num", "1", "--rounds", "1", "--windows", "8", "--wide", "32", "--out", str(tmp_path)]
    found = CliRunner().invoke(build_app(), ["reproduce", "attention", *SHORT, *options], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    figures = json.loads((tmp_path / "attention.json").read_text())
    assert figures["arm_names"] == ["all global", "window 8, no sink", "window 8, sink", "window 32, sink"]
    for result in figures["arms"]:
        (one,) = result["exams"]
        assert math.log(100) < one["loss"] < math.log(1000)  # after eight steps, of 448 tokens
        for speed in result["speeds"]:
            assert speed["cache_bytes"] == pytest.approx(speed["formula_bytes"], rel=0.01)
    whole, hybrid = figures["arms"][0]["speeds"][-1], figures["arms"][2]["speeds"][-1]
    assert whole["cache_bytes"] > 2 * hybrid["cache_bytes"]
    for arm in arms_of([8], 32):
        config = ModelConfig.from_pretrained(tmp_path / f"attention-{arm.slug}-0" / "model")
        assert (AttentionKind.SLIDING in config.layer_kinds) == (arm.window is not None)
        assert config.global_attention.rope_theta == load_story([]).long.stages[-1].global_rope_theta
        if arm.window is not None:
            sliding = config.sliding_attention
            assert (sliding.window_keys, sliding.sink) == (arm.window, arm.sink)
    assert (tmp_path / "attention.png").is_file()
    made = {path: path.read_bytes() for path in tmp_path.glob("attention-*/metrics.jsonl")}
    assert len(made) == 4
    CliRunner().invoke(build_app(), ["reproduce", "attention", *SHORT, *options, "--no-plot"], catch_exceptions=False)
    for path, content in made.items():
        assert path.read_bytes() == content
        log = (tmp_path / f"{path.parent.name}.log").read_text()
        assert log.count("training, 8 steps") == 1
