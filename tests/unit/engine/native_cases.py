"""Small models in shapes that hit edges of the native runtime, and a driver that feeds them in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from openmimo.config.model import AttentionKind, ModelConfig, preset
from openmimo.engine.native_runner import NativeRunner
from openmimo.engine.runner import Int32, StepInput
from openmimo.model import MiMoModel, build_model

S, G = AttentionKind.SLIDING, AttentionKind.GLOBAL


def shapes() -> dict[str, ModelConfig]:
    """By name; vocabularies, head sizes and windows that are no multiples of a vector, a block or a panel."""
    nano = preset("nano")
    assert nano.moe is not None
    sliding, whole = nano.sliding_attention, nano.global_attention
    odd = {"num_heads": 6, "num_kv_heads": 3, "qk_head_dim": 22, "v_head_dim": 14}
    return {
        "nano": nano,
        "odd sizes": nano.replace(
            vocab_size=131,
            hidden_size=70,
            dense_dim=90,
            layer_kinds=(G, S, S, G),
            layer_is_moe=(False, True, True, True),
            moe=type(nano.moe)(num_experts=5, num_experts_per_token=3, expert_dim=34, routed_scaling=1.7),
            sliding_attention=type(sliding)(**odd, rope_theta=1e4, sink=True, window_keys=77),
            global_attention=type(whole)(**odd, rope_theta=1e5, sink=True),
        ),
        "window of 5, no experts": nano.replace(
            layer_kinds=(S, S),
            layer_is_moe=(False, False),
            moe=None,
            sliding_attention=type(sliding)(
                num_heads=4, num_kv_heads=1, qk_head_dim=32, v_head_dim=16, rope_theta=1e4, sink=False, window_keys=5
            ),
        ),
    }


def random_model(config: ModelConfig, seed: int = 0) -> MiMoModel:
    """Weights large enough that every part matters, sinks and router biases away from zero."""
    model = build_model(config.replace(init_std=0.08), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "sink" in name:
                tensor.normal_(generator=generator)
            if "e_score_correction_bias" in name:
                tensor.normal_(0.0, 0.1, generator=generator)
    return model


def make_runner(model: MiMoModel, weights: str = "float32", threads: int = 2, **options: Any) -> NativeRunner:
    return NativeRunner(model, weights=weights, num_rows=4, num_pages=32, threads=threads, **options)


def ints(*values: int) -> Int32:
    return np.array(values, np.int32)


def feed(
    runner: NativeRunner, tokens: Int32, pieces: Sequence[int], *, row: int = 0, garbage: int = 0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Logits and routes after every token, fed in pieces; `garbage` wrong tokens behind each piece are not kept."""
    pages = np.arange(row * 8, row * 8 + 8, dtype=np.int32)
    start, logits, routes = 0, [], []
    for count in pieces:
        wrong = np.full(garbage, 1, np.int32)
        step = StepInput(
            token_ids_N=np.concatenate((tokens[start : start + count], wrong)),
            rows_S=ints(row),
            starts_S=ints(start),
            counts_S=ints(count + garbage),
            page_tables=(pages,),
            logits_M=np.arange(count, dtype=np.int32),
        )
        out = runner.forward(step)
        logits.append(out.logits_MV)
        routes.append(out.routed_experts_NLk[:count])
        runner.commit(ints(row), ints(count))
        start += count
    return np.concatenate(logits), np.concatenate(routes)
