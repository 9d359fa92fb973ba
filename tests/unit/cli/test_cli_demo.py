"""`openmimo demo` and `openmimo train` from the recipe of the repository, shortened to seconds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import openmimo.evals.speed
from openmimo.cli.main import build_app
from openmimo.config.recipe import load_recipe
from openmimo.config.train import TrainRecipe
from openmimo.engine import Engine
from openmimo.errors import ConfigError, TrainingError
from openmimo.evals.speed import SpeedReport
from openmimo.reproduce import story

RECIPE = Path(__file__).parents[3] / "recipes" / "demo.toml"
SHORT = [
    "threads=1",
    "tokenizer.train_documents=60",
    "data.sequence_length=128",
    "data.batch_sequences=2",
    *(f"stages.{index}.steps=2" for index in range(3)),
    "stages.0.warmup_steps=1",
    "model.max_positions=512",
]
SHORT_POLICY = ["threads=1", "steps=1", "rollout.prompts=3", "rollout.group_size=2", "rollout.max_tokens=8"]
SHORT_STORY = [
    *(f"base.{change}" for change in SHORT),
    *(f"{part}.{change}" for part in ("teacher", "student") for change in SHORT_POLICY),
]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(), list(arguments), catch_exceptions=False)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tokens each: a model after six steps never stops by itself."""
    examine, measure = openmimo.evals.evaluate_domains, openmimo.evals.speed.measure_draft_speed

    def brief(engine: Engine, prompts: list[list[int]], *, max_tokens: int) -> SpeedReport:
        return measure(engine, prompts[:1], max_tokens=min(max_tokens, 8))

    monkeypatch.setattr("openmimo.evals.evaluate_domains", partial(examine, max_tokens=8))
    monkeypatch.setattr(story, "MAX_TOKENS", 8)
    monkeypatch.setattr(story, "CURVE_PROBLEMS", 2)
    monkeypatch.setattr("openmimo.evals.speed.measure_draft_speed", brief)


def test_the_repository_shows_the_recipes_of_the_package() -> None:
    """Catches a second recipe, which the README would name and the demo not run."""
    for name in ("demo", "teacher", "mopd"):
        assert (RECIPE.parent / f"{name}.toml").samefile(story.RECIPES / f"{name}.toml")


@pytest.mark.usefixtures("short_answers")
def test_the_demo_runs_reports_and_may_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the demo that is only run by hand, a report without the figures that the README names, a recipe that
    is found in a clone only."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "demo"
    arguments = ("demo", "--out", str(out), "--num", "2")
    done = invoke(*arguments, *SHORT_STORY)
    assert done.exit_code == 0
    assert "Talk to it:  openmimo serve --model" in done.output
    assert "headroom recovered" in done.output
    report = json.loads((out / "report.json").read_text())
    assert set(report["domains"]) == set(report["acceptance_length"]) == {"math", "code", "logic"}
    assert all(0 <= part["accuracy"] <= 1 for part in report["domains"].values())
    assert all(1 <= length <= 4 for length in report["acceptance_length"].values())
    assert isinstance(report["identical_output"], bool)
    assert set(report["teachers"]) == {"math", "code", "logic"}
    assert set(report["students"]) == {"MOPD"}
    assert (out / "student.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "model" / "model.safetensors.index.json").is_file() or (out / "model" / "config.json").is_file()
    again = invoke(*arguments, "--resume", *SHORT_STORY)
    assert again.exit_code == 0
    assert "training, 6 steps" in done.output
    assert "training, 6 steps" not in again.output


def test_training_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    """Catches a run that is mixed with an earlier one, or removes it unasked."""
    out = str(tmp_path / "run")
    assert invoke("train", "pretrain", str(RECIPE), "--out", out, *SHORT).exit_code == 0
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    with pytest.raises(TrainingError, match="--overwrite"):
        invoke("train", "pretrain", str(RECIPE), "--out", out, *SHORT)


def test_the_resolved_recipe_is_printed_and_can_be_run(tmp_path: Path) -> None:
    """An override that is lost, or a printed recipe that does not load."""
    done = invoke("train", "pretrain", str(RECIPE), "--print-config", "stages.1.steps=7")
    (tmp_path / "printed.toml").write_text(done.output)
    assert load_recipe(tmp_path / "printed.toml", [], TrainRecipe).stages[1].steps == 7


def test_sft_refuses_a_recipe_that_pretrains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['pretrain'\] are not of kind 'sft'"):
        invoke("train", "sft", str(RECIPE), "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
