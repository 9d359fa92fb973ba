"""Training on several processes beside one: the same losses, and checkpoints that any number of them reads."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rank_cases import (
    ENVIRONMENT,
    RECIPE,
    STEPS,
    WORKER,
    children,
    torchrun,
    torchrun_command,
    train_command,
    train_on,
)
from safetensors.torch import load_file

from openmimo.checkpoint.training_state import checkpoint_dirs
from openmimo.config.recipe import load_recipe
from openmimo.config.train import TrainRecipe
from openmimo.errors import ConfigError
from openmimo.train.loop import train

# Number of processes, and of those that divide the experts.
LAYOUTS = [(2, 1), (4, 2)]


def losses(run_dir: Path) -> list[tuple[float, ...]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [(record["loss"], *record["mtp_losses"], record["balance_loss"], record["grad_norm"]) for record in records]


def assert_close(found: Sequence[tuple[float, ...]], wanted: Sequence[tuple[float, ...]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-4), f"step {step + 1}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of every layout."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "recipe.toml").write_text(RECIPE)
    train(load_recipe(folder / "recipe.toml", [], TrainRecipe), folder / "1-1")
    for size, expert_ranks in LAYOUTS:
        done = train_on(
            size, folder / "recipe.toml", folder / f"{size}-{expert_ranks}", f"parallel.expert_ranks={expert_ranks}"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("model in") == 1  # one of them reports
    return folder


@pytest.mark.parametrize(("size", "expert_ranks"), LAYOUTS)
def test_ranks_learn_what_one_process_learns(folder: Path, size: int, expert_ranks: int) -> None:
    """Catches a gradient that is summed instead of averaged, targets that count by rank, a norm of one part, a load of
    one rank, rows that are trained on twice, and a head that is replicated from one part."""
    run_dir = folder / f"{size}-{expert_ranks}"
    assert_close(losses(run_dir), losses(folder / "1-1"))
    for key in ("tokens", "num_zeros"):
        ours, theirs = (
            [json.loads(line)[key] for line in (each / "metrics.jsonl").read_text().splitlines()]
            for each in (run_dir, folder / "1-1")
        )
        assert ours == theirs
    ours, theirs = (
        load_file(each / "model" / "model-00001-of-00001.safetensors") for each in (run_dir, folder / "1-1")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("written_by", ["1-1", "4-2"])
def test_a_checkpoint_is_the_same_bits_for_any_number_of_ranks(folder: Path, written_by: str, tmp_path: Path) -> None:
    """Catches a part that is read into another place, and moments or weights that are left behind."""
    step = checkpoint_dirs(folder / written_by / "checkpoints")[-1]
    found: list[dict[str, torch.Tensor]] = []
    for size, expert_ranks in ((1, 1), (2, 1) if written_by == "1-1" else (4, 4)):
        target = tmp_path / f"{size}.safetensors"
        if size == 1:
            done = subprocess.run(
                [sys.executable, str(WORKER), str(step), str(target), "1"], check=False, capture_output=True, text=True
            )
        else:
            done = torchrun(size, str(WORKER), str(step), str(target), str(expert_ranks))
        assert done.returncode == 0, done.stderr
        found.append(load_file(target))
    assert any(name.startswith("adamw.exp_avg_sq.mtp_heads.2") for name in found[0])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, tensor in found[0].items():
            assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize(("size", "expert_ranks"), [(1, 1), (2, 2)])
def test_a_run_goes_on_with_other_ranks(folder: Path, size: int, expert_ranks: int, tmp_path: Path) -> None:
    """Catches a data cursor that skips or repeats rows where the number of ranks changes."""
    out = tmp_path / "run"
    shutil.copytree(folder / "4-2", out)
    for later in checkpoint_dirs(out / "checkpoints")[1:]:
        shutil.rmtree(later)
    if size == 1:
        train(load_recipe(folder / "recipe.toml", [], TrainRecipe), out, resume=True)
    else:
        done = train_on(size, folder / "recipe.toml", out, "--resume", f"parallel.expert_ranks={expert_ranks}")
        assert done.returncode == 0, done.stderr
    assert_close(losses(out), losses(folder / "1-1"))


def test_a_killed_rank_ends_the_run_and_a_bad_checkpoint_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """Catches ranks that wait for ever for one that is gone, and a part that is trusted although one bit is wrong."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        torchrun_command(2, *train_command(folder / "recipe.toml", out)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    while len(checkpoint_dirs(out / "checkpoints")) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    ranks = children(process.pid)
    if not ranks:
        pytest.skip("this system does not tell a process's children")
    os.kill(random.Random(0).choice(ranks), 9)
    assert process.wait(120) != 0
    newest = checkpoint_dirs(out / "checkpoints")[-1]
    part = next((newest / "training_state").glob("shard-00002-*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    done = train_on(2, folder / "recipe.toml", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "skipping damaged checkpoint" in done.stderr
    assert_close(losses(out), losses(folder / "1-1"))


@pytest.mark.parametrize(
    ("size", "override", "message"),
    [
        (2, "parallel.expert_ranks=3", "parallel.expert_ranks=3 must divide the number of processes, 2"),
        (2, "data.batch_sequences=5", "data.batch_sequences=5 cannot be divided among 2 processes"),
        (2, "model.num_experts=5", "parallel.expert_ranks=2 does not divide the experts (5)"),
    ],
)
def test_what_cannot_be_divided_is_said_at_once(
    folder: Path, size: int, override: str, message: str, tmp_path: Path
) -> None:
    """Catches a layout that fails in the middle of a step, or hangs."""
    options = [override, *(["parallel.expert_ranks=2"] if "num_experts" in override else [])]
    done = train_on(size, folder / "recipe.toml", tmp_path / "run", *options)
    assert done.returncode != 0
    assert message in done.stderr


def test_one_process_cannot_divide_experts(folder: Path, tmp_path: Path) -> None:
    """Catches a setting that is ignored where there is one process."""
    recipe = load_recipe(folder / "recipe.toml", ["parallel.expert_ranks=2"], TrainRecipe)
    with pytest.raises(ConfigError, match="start them with torchrun"):
        train(recipe, tmp_path / "run")
