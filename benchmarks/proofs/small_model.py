"""A model of the full architecture, small enough for millions of tokens, and trained until some drafts are right.

It reads bytes: worked problems, one after the other.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from openmimo import tasks
from openmimo.checkpoint import save_model
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.model import MiMoModel, build_model, cast_model
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.step import StepSettings, train_step

TRAIN_STEPS = 300
BATCH, LENGTH = 16, 192
LEARNING_RATE = 3e-3
RANDOM_STD = 0.12
DOMAINS = ("math", "code", "logic")


def small_config() -> ModelConfig:
    """Both kinds of layers, dense and sparse ones, a window that every text leaves, three MTP heads."""

    def attention(kv_heads: int, theta: float, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=4,
            num_kv_heads=kv_heads,
            qk_head_dim=16,
            v_head_dim=16,
            rope_theta=theta,
            sink=window is not None,
            window_keys=window,
        )

    return ModelConfig(
        vocab_size=256,
        hidden_size=64,
        dense_dim=128,
        layer_kinds=(AttentionKind.GLOBAL, AttentionKind.SLIDING, AttentionKind.SLIDING, AttentionKind.GLOBAL),
        layer_is_moe=(False, True, True, True),
        global_attention=attention(1, 1e5, None),
        sliding_attention=attention(2, 1e4, 16),
        moe=MoEConfig(num_experts=8, num_experts_per_token=2, expert_dim=32),
        max_positions=1024,
        rope_fraction=0.5,
    )


def problem_text(index: int, *, split: str, seed: int = 0) -> str:
    """A problem with its worked answer."""
    problem = tasks.sample_problem(DOMAINS[index % len(DOMAINS)], split=split, level=1, seed=seed, index=index)
    return f"{problem.prompt}\n{problem.solution}\n\n"


def save_small_model(folder: Path) -> None:
    """Train the model for half a minute and save it."""
    model = _train()
    save_model(cast_model(model, torch.float32), folder, dtype="float32")


def save_random_model(folder: Path) -> None:
    """Random weights with logits of order 1, in float32."""
    save_model(build_model(small_config().replace(init_std=RANDOM_STD)), folder, dtype="float32")


def _train() -> MiMoModel:
    config = small_config()
    model = build_model(config.replace(init_std=0.06), dtype=torch.bfloat16).train()
    optimizer = MasterAdamW(model.named_parameters())
    settings = StepSettings(
        num_mtp_heads=config.num_mtp_heads, mtp_weight=0.5, balance_weight=1e-5, bias_update_rate=1e-3
    )
    bytes_N, place = _training_bytes(TRAIN_STEPS * BATCH * LENGTH), 0
    for step in range(TRAIN_STEPS):
        tokens_BT = bytes_N[place : place + BATCH * LENGTH].view(BATCH, LENGTH)
        place += BATCH * LENGTH
        result = train_step(
            model,
            optimizer,
            tokens_BT,
            torch.zeros_like(tokens_BT),
            torch.arange(LENGTH).expand_as(tokens_BT),
            torch.ones_like(tokens_BT, dtype=torch.bool),
            learning_rate=LEARNING_RATE * min(1.0, (step + 1) / 20, 4 * (1 - step / TRAIN_STEPS)),
            settings=settings,
        )
        if step % 50 == 49:
            print(f"training: step {step + 1}, loss {result.losses.total.item():.3f}", file=sys.stderr, flush=True)
    return model.eval()


def _training_bytes(num_bytes: int) -> Tensor:
    text = bytearray()
    for index in count():
        text += problem_text(index, split="train").encode()
        if len(text) >= num_bytes:
            return torch.frombuffer(text, dtype=torch.uint8)[:num_bytes].long()
    raise AssertionError("problems never end")
