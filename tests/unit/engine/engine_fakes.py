"""A small random model, prompts of every awkward length, a byte tokenizer, and drafts made to order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from openmimo.config.model import ModelConfig, preset
from openmimo.engine import Engine, SamplingParams
from openmimo.engine.runner import Int32
from openmimo.engine.torch_runner import TorchRunner
from openmimo.model import MiMoModel, build_model

VOCAB = 320
EOS = 256


def small_config(**changes: object) -> ModelConfig:
    """Nano with a window of 8 keys, so that every ring wraps many times."""
    nano = preset("nano")
    config = nano.replace(
        vocab_size=VOCAB,
        hidden_size=64,
        dense_dim=96,
        max_positions=512,
        sliding_attention=dataclasses.replace(nano.sliding_attention, window_keys=8, num_heads=4, qk_head_dim=16),
        global_attention=dataclasses.replace(nano.global_attention, qk_head_dim=16),
    )
    return config.replace(**changes)


def small_model(*, seed: int = 0, **changes: object) -> MiMoModel:
    """Random weights; sinks too, so that they matter."""
    model = build_model(small_config(**changes), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sink_bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def awkward_prompts(count: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Prompts of 1, 2, 3, ... tokens first, then of any length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [i + 1 if i < 8 else int(torch.randint(1, longest, (1,), generator=generator)) for i in range(count)]
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


class ByteCodec:
    """One token per UTF-8 byte."""

    eos_token_ids = (EOS,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def plain_tokens(model: MiMoModel, prompts: list[list[int]], max_tokens: int) -> list[tuple[int, ...]]:
    """The reference: a whole forward pass per token, no cache."""
    texts = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(max_tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            texts.append(tuple(ids[len(prompt) :]))
    return texts


Change = Callable[[int, np.ndarray], np.ndarray]


def plant_drafts(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], texts: Sequence[Sequence[int]], change: Change
) -> list[tuple[list[int], list[int]]]:
    """Replace what is verified by the true continuation after `change(step, true_SK)`; heads still run.

    Row b must hold prompt b. Returns a list that collects the positions of the newest tokens and the real drafts
    of every row, for every step.
    """
    record: list[tuple[list[int], list[int]]] = []
    genuine = TorchRunner.draft

    def draft(self: TorchRunner, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        drafts_SK = genuine(self, rows_S, lengths_S, tokens_SW)
        true = []
        for row, length, drafts in zip(rows_S.tolist(), lengths_S.tolist(), drafts_SK.tolist(), strict=True):
            record.append(([row, length], drafts))
            place = length - len(prompts[row]) + 1
            true.append([*texts[row], *[0] * 8][place : place + drafts_SK.shape[1]])
        return change(len(record), np.array(true, dtype=np.int32))

    monkeypatch.setattr(TorchRunner, "draft", draft)
    return record


def make_engine(model: MiMoModel, draft_heads: int | str = 3, **options: object) -> Engine:
    """A PyTorch engine with a fixed number of drafts."""
    return Engine(model, runner="torch", draft_heads=draft_heads, **options)


def generate_ids(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [completion.token_ids for completion in engine.generate(prompts, params)]
