"""Keys and values in 8 bits: against the PyTorch model with rounded keys and values, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openmimo.engine import Engine, SamplingParams
from openmimo.engine.native_runner import KERNELS_VARIABLE, NativeRunner
from openmimo.errors import RequestError
from openmimo.model import MiMoModel, attention

native = pytest.importorskip("openmimo._native", reason="this installation has no C++ runtime")

from native_cases import feed, make_runner, random_model, shapes  # noqa: E402

TOKENS = 230
SHAPES = shapes()


def rounded(x: Tensor) -> Tensor:
    """The last axis as whole multiples of its largest magnitude / 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def rounding_first(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend_rounded(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        return attend(q, rounded(k), rounded(v), **rest)

    return attend_rounded


def model_with_outliers(name: str) -> MiMoModel:
    """One dim of every key and value is large, and what it meets small: 8 bits leave little of the other dims."""
    model = random_model(SHAPES[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, attention.Attention):
                g, (q_end, k_size, _) = module.geometry, module.split_sizes
                qkv, out = module.qkv_proj.weight, module.o_proj.weight
                last = g.qk_head_dim - 1  # not rotated
                qkv[last : q_end : g.qk_head_dim] /= 100
                qkv[q_end + last : q_end + k_size : g.qk_head_dim] *= 100
                qkv[q_end + k_size :: g.v_head_dim] *= 100
                out[:, :: g.v_head_dim] /= 100
    return model


def kl(expected: np.ndarray, got: np.ndarray) -> float:
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (expected, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kernels", native.available_kernels())
@pytest.mark.parametrize("name", ["nano", "odd sizes"])
def test_attention_is_that_of_rounded_keys_and_values(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches scales of the wrong position or head, keys of this very step that are not rounded, and bytes misread."""
    monkeypatch.setenv(KERNELS_VARIABLE, kernels)
    model, tokens = model_with_outliers(name), np.random.default_rng(0).integers(60, size=TOKENS).astype(np.int32)
    narrow, _ = feed(make_runner(model, "bf16", cache="int8"), tokens, [100, 4, 1, 1, TOKENS - 106])
    ids = torch.from_numpy(tokens).long()[None]
    with torch.no_grad():
        exact = model(ids).logits[0].numpy()
        for function in ("attend", "attend_window"):
            monkeypatch.setattr(attention, function, rounding_first(getattr(attention, function)))
        twin = model(ids).logits[0].numpy()
    # What is left is bf16: its rounding of products' inputs, and choices of experts that it turns.
    assert kl(twin, narrow) < 0.25 * kl(exact, narrow)


@pytest.mark.parametrize("name", list(SHAPES))
def test_pieces_threads_rejected_tokens_and_copies_change_no_bit(name: str) -> None:
    """Catches keys that are attended before they are rounded, and scales that copies of rows or rings forget."""
    config = SHAPES[name]
    model, tokens = random_model(config), np.random.default_rng(1).integers(60, size=TOKENS).astype(np.int32)
    runner = make_runner(model, "bf16", cache="int8")
    logits, routes = feed(runner, tokens, [TOKENS])
    for pieces, row, garbage in (([1] * TOKENS, 1, 3), ([100, 4, 4, 1, 64, TOKENS - 173], 3, 0)):
        again, routes_again = feed(runner, tokens, pieces, row=row, garbage=garbage)
        assert (again == logits).all()
        assert (routes_again == routes).all()
    alone, _ = feed(make_runner(model, "bf16", threads=1, cache="int8"), tokens, [TOKENS])
    assert (alone == logits).all()


def test_what_prompts_left_in_scratch_memory_is_not_read() -> None:
    """Catches scales of lanes that nobody sees: bytes of an earlier prompt may be no numbers at all as floats."""
    config = SHAPES["nano"]
    model, rng = random_model(config), np.random.default_rng(3)
    runner = make_runner(model, "bf16", cache="int8")
    prompts = [rng.integers(config.vocab_size, size=n).astype(np.int32) for n in (230, 9, 200, 17, 150, 41, 5, 130, 70)]
    for number, prompt in enumerate(prompts):
        logits, _ = feed(runner, prompt, [len(prompt)], row=number % 4)
        alone, _ = feed(make_runner(model, "bf16", cache="int8"), prompt, [len(prompt)])
        assert (logits == alone).all()


def test_engines_write_the_same_with_drafts_prefix_cache_and_forks() -> None:
    """Catches snapshots and pages whose scales stay behind."""
    config = SHAPES["nano"]
    model = random_model(config)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(config.vocab_size, size=n).tolist() for n in (5, 70, 140)]
    params = SamplingParams(max_tokens=90, ignore_eos=True, temperature=0.8, seed=1, n=2)
    texts: list[list[tuple[int, ...]]] = []
    for heads, batch in ((0, 1), (3, 6)):
        engine = Engine(model, runner="native", cache="int8", draft_heads=heads, max_batch=batch)
        for _ in range(2):  # the second time from the prefix cache
            texts.append([completion.token_ids for completion in engine.generate(prompts, params)])
    assert all(text == texts[0] for text in texts)


def test_bytes_follow_the_formula() -> None:
    """Catches a cache that is narrow in name only: a byte per number, and two floats per position and head."""
    model = random_model(SHAPES["nano"])
    wide, narrow = make_runner(model, "bf16"), make_runner(model, "bf16", cache="int8")
    whole = model.config.global_attention
    num_global = sum(kind.value == "global" for kind in model.config.layer_kinds)
    per_token = whole.num_kv_heads * (whole.qk_head_dim + whole.v_head_dim + 8)
    assert narrow.page_bytes == num_global * 64 * per_token
    local = model.config.sliding_attention
    ratio = (local.qk_head_dim + local.v_head_dim + 8) / (2 * (local.qk_head_dim + local.v_head_dim))
    assert narrow.row_bytes == pytest.approx(ratio * wide.row_bytes, rel=1e-6)


def test_what_cannot_be_is_named() -> None:
    """Catches options that are ignored."""
    model = random_model(SHAPES["nano"])
    with pytest.raises(RequestError, match='cache="int8" needs bf16 arithmetic'):
        NativeRunner(model, weights="float32", cache="int8")
    with pytest.raises(RequestError, match="cache='int4' is no format"):
        NativeRunner(model, cache="int4")
    with pytest.raises(RequestError, match="needs the native runner"):
        Engine(model, runner="torch", cache="int8")
