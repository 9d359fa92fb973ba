"""A model that is right now and then: trained for seconds on one task, with its tokenizer, once per test run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from openmimo.config.recipe import parse_recipe
from openmimo.config.rl import RLRecipe
from openmimo.config.train import TrainRecipe
from openmimo.train.loop import train

BASE = {
    "name": "base",
    "seed": 1,
    "model": {"preset": "nano", "init_std": 0.04},
    "tokenizer": {"vocab_size": 420, "train_documents": 400},
    "data": {
        "sequence_length": 128,
        "batch_sequences": 12,
        "packing": "whole",
        "sources": [{"kind": "task", "domain": "logic", "task": "knights"}],
    },
    "optimizer": {"peak_lr": 4e-3, "final_lr": 1e-3},
    "checkpoint": {"every_steps": 0},
    "stages": [{"name": "sft", "kind": "sft", "steps": 120, "warmup_steps": 10, "mtp_heads": 3}],
}


@cache
def base_folder() -> Path:
    """A run folder with the model in it."""
    folder = Path(tempfile.mkdtemp(prefix="openmimo-rl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(parse_recipe(BASE, TrainRecipe), folder / "base")
    return folder / "base"


def rl_recipe(**changes: object) -> RLRecipe:
    """Four prompts with four answers each; changes replace whole tables but `rollout` and `loss`, which are joined."""
    table: dict[str, object] = {
        "name": "rl",
        "algorithm": "grpo",
        "model": str(base_folder()),
        "steps": 3,
        "seed": 4,
        "sources": [{"domain": "logic", "task": "knights"}],
        "optimizer": {"peak_lr": 2e-4, "final_lr": 2e-4},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "micro_batch_tokens": 512,
        "precision": "fp32",
    }
    rollout = {"prompts": 4, "group_size": 4, "max_tokens": 96, "max_batch": 16}
    table["rollout"] = rollout | changes.pop("rollout", {})  # type: ignore[operator]
    return parse_recipe(table | changes, RLRecipe)
