"""Whole post-training runs: what they learn from, what they write, and that they go on bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_cases import base_folder, rl_recipe

from openmimo.checkpoint import load_model, save_model
from openmimo.config.recipe import load_recipe, parse_recipe, to_toml
from openmimo.config.rl import RLRecipe
from openmimo.errors import CheckpointError, TrainingError
from openmimo.rl.batching import pack
from openmimo.rl.loop import PolicyRun
from openmimo.rl.monitors import TrendAlert
from openmimo.rl.teachers import Teachers, warn_about_origin
from openmimo.rl.update import mtp_loss
from openmimo.text import Tokenizer, train_tokenizer

RECIPES = Path(__file__).parents[3] / "recipes"
GRPO = {"steps": 4}
MOPD = {
    "steps": 4,
    "algorithm": "mopd",
    "teachers": [{"domain": "logic", "folder": "self"}],
    "loss": {"outcome_weight": 0.5},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder / "model").state_dict()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["monitor_share_of_step"], record["rollout"]["seconds"]
        del record["acceptance_length"]  # how many drafts pay is measured; texts do not depend on it
    return records


@pytest.mark.parametrize("changes", [GRPO, MOPD], ids=["grpo", "mopd"])
def test_a_run_that_stops_goes_on_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    """Catches a scheduler, a seed, moments or a sampler that start afresh."""
    recipe = rl_recipe(**changes)
    PolicyRun(recipe, tmp_path / "whole").finish()
    broken = PolicyRun(recipe, tmp_path / "broken")
    for _ in range(2):
        broken.one_step()
    broken.save()
    broken.one_step()  # lost, and done again
    PolicyRun(recipe, tmp_path / "broken", resume=True).finish()
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "broken")
    assert PolicyRun(recipe, tmp_path / "broken", resume=True).sampler.weights_version == recipe.steps
    start = weights(base_folder())
    assert any(not torch.equal(one[name], start[name]) for name in one)


def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL in the middle of a step, twice; every prompt is counted once."""
    recipe = rl_recipe(**(GRPO | {"steps": 6}))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    PolicyRun(recipe, tmp_path / "whole").finish()
    code = "from openmimo.cli.train import train_app; train_app()"
    command = [sys.executable, "-c", code, "rl", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "killed")]
    for steps in (2, 4):
        resume = ["--resume"] if (tmp_path / "killed").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not (tmp_path / f"killed/checkpoints/step-{steps:08d}").exists() and time.monotonic() < until:
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = read_metrics(tmp_path / "killed")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records == read_metrics(tmp_path / "whole")


def test_other_recipes_and_used_folders_are_refused(tmp_path: Path) -> None:
    run = PolicyRun(rl_recipe(), tmp_path)
    run.save()
    with pytest.raises(CheckpointError, match="another recipe"):
        PolicyRun(rl_recipe(seed=9), tmp_path, resume=True)
    with pytest.raises(TrainingError, match="--overwrite"):
        PolicyRun(rl_recipe(), tmp_path)


def test_a_teacher_that_is_the_student_says_nothing_at_first(tmp_path: Path) -> None:
    """The divergence from oneself is what the sampler's other experts make of it; far teachers are reported."""
    record = PolicyRun(rl_recipe(**MOPD), tmp_path / "self").one_step()
    assert abs(record["divergence"]["logic"]) < 1e-3
    assert record["far_teachers"] == []
    assert warn_about_origin({"logic": 0.3, "math": 0.1}, 0.2) == ["logic"]


@pytest.mark.parametrize("signal_name", ["sampled", "full", "top_k"])
def test_distillation_moves_the_student_to_its_teacher(signal_name: str, tmp_path: Path) -> None:
    """A student that forgot much of what its teacher knows comes back to it with each signal. Its distance, half a nat,
    is far above what answers differ by from step to step, on any machine."""
    model = load_model(base_folder() / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "mtp_heads" not in name and "gate.weight" not in name:
                weight += 0.6 * weight.std() * torch.randn(weight.shape, generator=generator)
    save_model(model, tmp_path / "start" / "model", dtype="float32")
    Tokenizer.load(base_folder() / "model").save(tmp_path / "start" / "model")
    recipe = rl_recipe(
        steps=20,
        algorithm="mopd",
        model=str(tmp_path / "start"),
        teachers=[{"domain": "logic", "folder": str(base_folder())}],
        loss={"outcome_weight": 0.0, "signal": signal_name, "top_k": 8},
        rollout={"group_size": 8},
        optimizer={"peak_lr": 3e-4, "final_lr": 3e-4},
        warmup_steps=1,
    )
    run = PolicyRun(recipe, tmp_path / "student")
    gaps = [run.one_step()["divergence"]["logic"] for _ in range(20)]
    # A step's figure is a sample of 32 answers, so several are taken together.
    assert sum(gaps[-5:]) < 0.6 * sum(gaps[:5])


@pytest.mark.parametrize("heads", [0, 3])
def test_exact_runs_have_no_mismatch_at_all(heads: int, tmp_path: Path) -> None:
    """One batch-invariant path: the greatest difference of log-probabilities is 0, after updates too."""
    recipe = rl_recipe(rollout={"exact": True, "draft_heads": heads, "temperature": 0.8, "top_p": 0.95})
    run = PolicyRun(recipe, tmp_path)
    for _ in range(3):
        record = run.one_step()
        if record["num_updates"]:
            assert record["mismatch"]["worst"] == record["mismatch"]["kl"] == 0.0
            assert record["mismatch"]["routes"] == 0.0
            assert record["native_mismatch"]["routes"] == 0.0


def test_teachers_of_other_tokenizers_and_domains_are_refused(tmp_path: Path) -> None:
    from openmimo.config.rl import TeacherRecipe

    start = base_folder() / "model"
    cpu = torch.device("cpu")
    other = tmp_path / "other"
    load = load_model(start)
    from openmimo.checkpoint import save_model

    save_model(load, other)
    train_tokenizer(["something else entirely"] * 3, vocab_size=300).save(other)
    with pytest.raises(TrainingError, match="another tokenizer"):
        Teachers([TeacherRecipe(domain="logic", folder=str(other))], start=start, dtype=torch.float32, device=cpu)
    teachers = Teachers([TeacherRecipe(domain="logic", folder="self")], start=start, dtype=torch.float32, device=cpu)
    with pytest.raises(TrainingError, match="no teacher for domain 'math'"):
        teachers.folder("math")


def test_the_heads_loss_reaches_the_heads_alone(tmp_path: Path) -> None:
    """Drafting is kept aligned without pulling at the policy."""
    run = PolicyRun(rl_recipe(), tmp_path)
    groups, _ = run.rollout.collect(keeps_uniform=True)
    (batch, *_) = pack([one for group in groups for one in group], max_tokens=4096, num_experts=8)
    output = run.model(batch.token_ids_BT, position_ids_BT=batch.position_ids_BT, document_ids_BT=batch.document_ids_BT)
    loss = mtp_loss(output, batch)
    loss.backward()
    assert float(loss.detach()) > 0
    for name, parameter in run.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("mtp_heads"), name


def test_num_zeros_alerts_on_rises_and_falls() -> None:
    alert = TrendAlert(window=3, factor=1.5)
    assert [alert.observe(value) for value in (100, 110, 90, 100, 105, 95)] == [None] * 6
    assert [alert.observe(value) for value in (200, 210, 220)][-1] == "rising"
    assert [alert.observe(value) for value in (40, 30, 20)][-1] == "falling"


def test_recipes_survive_their_toml() -> None:
    """The recipes that come with the package, and one with teachers, load back equal from what is printed."""
    recipes = [load_recipe(RECIPES / name, [], RLRecipe) for name in ("teacher.toml", "mopd.toml")]
    for recipe in (*recipes, rl_recipe(**MOPD)):
        assert parse_recipe(tomllib.loads(to_toml(recipe)), RLRecipe) == recipe
