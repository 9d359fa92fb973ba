"""A run that is killed goes on bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openmimo.config.model import ModelConfig
from openmimo.config.recipe import load_recipe
from openmimo.config.train import TrainRecipe
from openmimo.errors import CheckpointError, TrainingError
from openmimo.train import loop
from openmimo.train.interrupt import TrainingInterruptedError
from openmimo.train.run_folder import forget_later_metrics, make_folder

RECIPE = """
name = "kill"
seed = 3
threads = 1
[model]
preset = "nano"
[tokenizer]
vocab_size = 400
train_documents = 60
[data]
sequence_length = 64
batch_sequences = 4
[[data.sources]]
kind = "task"
domain = "math"
[[data.sources]]
kind = "text"
path = "{text}"
weight = 0.5
[checkpoint]
every_steps = 3
keep = 2
[log]
every_steps = 1
[[stages]]
name = "pretrain"
steps = 14
warmup_steps = 2
mtp_heads = 1
[[stages]]
name = "sft"
kind = "sft"
steps = 12
mtp_heads = 3
sequence_length = 128
batch_sequences = 2
global_rope_theta = 6e5
[[stages.sources]]
kind = "task"
domain = "logic"
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of a text that is long enough to be cut into pieces\n" for i in range(400)))
    path = tmp_path / "kill.toml"
    path.write_text(RECIPE.format(text=text))
    return path


def weights_hash(run_dir: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted((run_dir / "model").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def start(recipe: Path, out: Path, *, resume: bool) -> subprocess.Popen[bytes]:
    code = "from openmimo.cli.train import train_app; train_app()"
    command = [sys.executable, "-c", code, "pretrain", str(recipe), "--out", str(out)]
    return subprocess.Popen([*command, "--resume"] if resume else command, stdout=subprocess.DEVNULL)


def test_killed_at_five_random_points_ends_with_the_same_weights(recipe_path: Path, tmp_path: Path) -> None:
    """Catches any state that is not saved: moments, balance bias, data cursor, stage, step counter."""
    assert start(recipe_path, tmp_path / "whole", resume=False).wait(300) == 0
    rng = random.Random(0)
    killed = tmp_path / "killed"
    kills = sorted(rng.sample(range(4, 25), 5))
    for number, kill_at in enumerate(kills):
        process = start(recipe_path, killed, resume=number > 0)
        while not _has_reached(killed, kill_at):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert start(recipe_path, killed, resume=True).wait(300) == 0
    assert weights_hash(killed) == weights_hash(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 27))
    assert trained_theta(killed) == 6e5  # the last stage's, not the preset's


def trained_theta(run_dir: Path) -> float:
    return ModelConfig.from_pretrained(run_dir / "model").global_attention.rope_theta


def test_a_finished_run_resumed_keeps_its_last_rotary_base(recipe_path: Path, tmp_path: Path) -> None:
    """Catches a base that is set only when a stage begins, so that a run resumed behind its last stage loses it."""
    out = tmp_path / "run"
    short = ["stages.0.steps=2", "stages.0.warmup_steps=0", "stages.1.steps=2"]
    recipe = load_recipe(recipe_path, short, TrainRecipe)
    loop.train(recipe, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] - rows[1]["tokens"] <= 2 * 2 * 128
    shutil.rmtree(out / "model")
    loop.train(recipe, out, resume=True)
    assert trained_theta(out) == 6e5


def test_a_stage_ends_once_its_recent_loss_is_low(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an average that a resumed run forgets, the last stage's in the next, and a stage that ends too early."""
    monkeypatch.setattr(loop, "RECENT_STEPS", 4)
    last = ["stages.1.steps=3", 'stages.0.schedule="constant"']
    loop.train(load_recipe(recipe_path, last, TrainRecipe), tmp_path / "whole")
    losses = [row["loss"] for row in rows_of(tmp_path / "whole") if row["stage"] == "pretrain"]
    means = losses[:1]
    for loss in losses[1:]:
        means.append(means[-1] + (loss - means[-1]) / 4)
    # Reached for the first time by the eighth step: two checkpoints behind the beginning.
    assert min(means[:7]) > means[7]
    recipe = load_recipe(recipe_path, [*last, f"stages.0.until_loss={means[7] + 1e-9}"], TrainRecipe)
    out = tmp_path / "run"
    for stop in (5, 8):  # the second time it is saved right where the stage is done
        stopping = contextlib.nullcontext(lambda: rows_of(out)[-1]["step"] == stop)  # noqa: B023
        monkeypatch.setattr(loop, "interrupt_flag", lambda: stopping)  # noqa: B023
        with pytest.raises(TrainingInterruptedError, match=f"stopped at step {stop}"):
            loop.train(recipe, out, resume=stop > 5)
    monkeypatch.setattr(loop, "interrupt_flag", lambda: contextlib.nullcontext(lambda: False))
    loop.train(recipe, out, resume=True)
    rows = rows_of(out)
    assert [row["stage"] for row in rows] == ["pretrain"] * 8 + ["sft"] * 3
    assert [row["loss"] for row in rows[:8]] == losses[:8]
    # Any loss is low enough, and still it takes as many steps as the average is made of.
    recipe = load_recipe(recipe_path, [*last, "stages.0.until_loss=100.0"], TrainRecipe)
    loop.train(recipe, tmp_path / "short")
    assert [row["stage"] for row in rows_of(tmp_path / "short")] == ["pretrain"] * 4 + ["sft"] * 3


def rows_of(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _has_reached(run_dir: Path, step: int) -> bool:
    """Whether the run passed `step` and has a checkpoint to go on from."""
    metrics = run_dir / "metrics.jsonl"
    saved = any((run_dir / "checkpoints").glob("step-*"))
    return saved and metrics.is_file() and f'"step": {step},' in metrics.read_text()


def test_ctrl_c_saves_first(recipe_path: Path, tmp_path: Path) -> None:
    """Catches an interrupt that loses the steps since the last checkpoint."""
    out = tmp_path / "run"
    process = start(recipe_path, out, resume=False)
    while not _has_reached(out, 4):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    newest = max((out / "checkpoints").glob("step-*"))
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert newest.name == f"step-{last:08d}"


def test_resume_refuses_another_recipe(recipe_path: Path, tmp_path: Path) -> None:
    """Catches a run that silently goes on with other data or rates."""
    out = tmp_path / "run"
    short = ["stages.0.steps=2", "stages.0.warmup_steps=0", "stages.1.steps=2"]
    loop.train(load_recipe(recipe_path, short, TrainRecipe), out)
    other = load_recipe(recipe_path, [*short, "optimizer.peak_lr=1e-3"], TrainRecipe)
    with pytest.raises(CheckpointError, match="another recipe"):
        loop.train(other, out, resume=True)


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path: Path) -> None:
    """New checkpoints deleted as older than those of the run before, or a resume that takes those."""
    run_dir = tmp_path / "run"
    make_folder(run_dir, overwrite=False)
    make_folder(run_dir, overwrite=False)  # a run that made no checkpoint is no hindrance
    (run_dir / "checkpoints" / "step-00000500").mkdir(parents=True)
    (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"step-00000500; go on with --resume, replace it with --overwrite"):
        make_folder(run_dir, overwrite=False)
    make_folder(run_dir, overwrite=True)
    assert [path.name for path in run_dir.rglob("*")] == ["checkpoints", "notes.txt"]
    with pytest.raises(TrainingError, match="cannot write into"):
        make_folder(run_dir / "notes.txt", overwrite=False)


def test_metrics_behind_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    """Steps that stand in the curves twice after a kill, or half a line that breaks the plot."""
    path = tmp_path / "metrics.jsonl"
    forget_later_metrics(path, 3)
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 7)) + '{"step": 7, "lo')
    forget_later_metrics(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
