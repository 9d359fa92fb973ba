"""Attention's numbers and gradients against a dense float64 formula, at lengths that cross block boundaries."""

from __future__ import annotations

import pytest
import torch
from model_oracle import GLOBAL, SLIDING, random_model, random_tokens, small_config
from torch import Tensor

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.model.attention import Attention, make_plans


def dense_attention(
    module: Attention, config: ModelConfig, x_BTD: Tensor, document_ids_BT: Tensor, weights: dict[str, Tensor]
) -> Tensor:
    """All scores at once with a boolean T x T mask; the sink is a concatenated column. Positions are 0, 1, 2, ..."""
    g, num_tokens = module.geometry, x_BTD.shape[1]
    q, k, v = (x_BTD @ weights["qkv_proj.weight"].T).split(module.split_sizes, dim=-1)
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part, heads in ((q, g.num_heads), (k, g.num_kv_heads), (v, g.num_kv_heads))
    )
    half = config.rotary_dim(module.kind) // 2
    frequencies = g.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), torch.arange(num_tokens)[:, None] * frequencies)

    def rotated(part: Tensor) -> Tensor:
        pairs = torch.complex(part[..., :half], part[..., half : 2 * half]) * turn
        return torch.cat((pairs.real, pairs.imag, part[..., 2 * half :]), dim=-1)

    repeats = g.num_heads // g.num_kv_heads
    k, v = rotated(k).repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1) * config.value_scale
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    visible = (distance >= 0) & (distance < (g.window_keys or num_tokens))
    visible = visible & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
    scores = (rotated(q) @ k.transpose(-1, -2) / g.qk_head_dim**0.5).masked_fill(~visible, float("-inf"))
    if g.sink:
        column = weights["attention_sink_bias"].view(1, -1, 1, 1).expand(scores.shape[0], -1, num_tokens, 1)
        scores = torch.cat((scores, column), dim=-1)
    out = scores.softmax(-1)[..., :num_tokens] @ v
    return out.transpose(1, 2).flatten(-2) @ weights["o_proj.weight"].T


def compare(
    kind: AttentionKind, window_keys: int, num_tokens: int, packed: bool, dtype: torch.dtype
) -> dict[str, float]:
    """Relative error of the output and of every gradient of one attention layer."""
    config = small_config(window_keys=window_keys)
    generator = torch.Generator().manual_seed(window_keys + num_tokens)
    module = Attention(config, kind)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "weight" in name else 1.0, generator=generator)
    module.to(dtype)
    x_BTD = torch.randn(2, num_tokens, config.hidden_size, generator=generator).to(dtype).requires_grad_()
    ids_BT = torch.arange(num_tokens).expand(2, -1) // 37 if packed else torch.zeros(2, num_tokens, dtype=torch.int64)
    positions_BT = torch.arange(num_tokens).expand(2, -1)
    out_BTD = module(x_BTD, make_plans(config, positions_BT, ids_BT if packed else None, dtype)[kind])
    direction_BTD = torch.randn(out_BTD.shape, generator=generator)
    (out_BTD * direction_BTD.to(dtype)).sum().backward()

    exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    x64_BTD = x_BTD.detach().double().requires_grad_()
    expected_BTD = dense_attention(module, config, x64_BTD, ids_BT, exact)
    (expected_BTD * direction_BTD.to(dtype).double()).sum().backward()
    found = {"output": (out_BTD, expected_BTD), "x": (x_BTD.grad, x64_BTD.grad)}
    found |= {name: (p.grad, exact[name].grad) for name, p in module.named_parameters()}
    return {
        name: float((ours.double() - theirs).norm().detach() / theirs.norm().detach())
        for name, (ours, theirs) in found.items()
        if ours is not None and theirs is not None
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "window_keys", "num_tokens"),
    [(GLOBAL, 5, 83)] + [(SLIDING, window, 150) for window in (1, 7, 8, 9, 63, 64, 65, 128, 129)],
)
def test_output_and_gradients_match_float64(
    kind: AttentionKind, window_keys: int, num_tokens: int, packed: bool
) -> None:
    """A wrong mask at a block's edge, a key whose gradient is lost where blocks overlap, a sink without gradient."""
    errors = compare(kind, window_keys, num_tokens, packed, torch.float32)
    assert len(errors) == (5 if kind is SLIDING else 4)
    assert max(errors.values()) < 2e-6, errors


@pytest.mark.parametrize("kind", [GLOBAL, SLIDING])
def test_bfloat16_stays_near_float64(kind: AttentionKind) -> None:
    """Sums or gradients accumulated in bfloat16, which would lose far more than its rounding of 2^-8."""
    errors = compare(kind, 64, 150, True, torch.bfloat16)
    assert max(errors.values()) < 0.02, errors


def test_sink_of_minus_infinity_is_no_sink_and_a_large_one_silences() -> None:
    """A sink that carries value, or that is scaled like a score."""
    config = small_config(num_mtp_heads=0)
    plain = random_model(small_config(num_mtp_heads=0, sliding={"sink": False}))
    model = random_model(config)
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens_BT = random_tokens(config, 1, 12)
    sinks = [p for name, p in model.named_parameters() if name.endswith("sink_bias")]
    with torch.no_grad():
        for sink in sinks:
            sink.fill_(float("-inf"))
        torch.testing.assert_close(model(tokens_BT).logits, plain(tokens_BT).logits, atol=1e-5, rtol=0)
        for sink in sinks:
            sink.fill_(60.0)
        attention = model.layers[1].self_attn
        plan = model(tokens_BT).plans[SLIDING]
        assert attention(torch.randn(1, 12, config.hidden_size), plan).abs().max() < 1e-6


def test_fused_kernel_and_plain_products_agree() -> None:
    """Global layers take PyTorch's fused kernel on single documents; one packed document takes plain products."""
    config = small_config()
    model = random_model(config)
    tokens_BT = random_tokens(config, 2, 33)
    with torch.no_grad():
        fused, plain = model(tokens_BT).logits, model(tokens_BT, document_ids_BT=torch.zeros_like(tokens_BT)).logits
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", [0, 7, 20])
def test_only_the_window_and_the_future_of_a_token_change(changed: int) -> None:
    """A look ahead, or a sliding stack that sees further back than layers * (window - 1) tokens."""
    config = small_config(layer_kinds=(SLIDING,) * 4)
    model = random_model(config)
    tokens_BT = random_tokens(config, 1, 40)
    other_BT = tokens_BT.clone()
    other_BT[0, changed] = (other_BT[0, changed] + 1) % config.vocab_size
    with torch.no_grad():
        difference_T = (model(tokens_BT).hidden_BTD - model(other_BT).hidden_BTD).abs().amax(-1)[0]
    reach = changed + 4 * (5 - 1)
    # Not exactly 0: the experts' products of other tokens may have another number of rows.
    assert float(torch.cat((difference_T[:changed], difference_T[reach + 1 :])).max()) < 1e-5
    assert float(difference_T[changed : changed + 9].min()) > 1e-4


def test_bfloat16_logits_stay_near_float32() -> None:
    """A part of the model that loses precision when its weights are cast."""
    config = small_config(moe=None, layer_is_moe=(False,) * 4)
    model = random_model(config)
    tokens_BT = random_tokens(config, 2, 40)
    with torch.no_grad():
        exact = model(tokens_BT).logits
        rounded = model.to(torch.bfloat16)(tokens_BT).logits.float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.03


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_matches_cpu() -> None:
    """An operation that exists or is right on the CPU only."""
    config = small_config()
    model = random_model(config)
    tokens_BT = random_tokens(config, 2, 150)
    with torch.no_grad():
        expected = model(tokens_BT).logits
        found = model.to("cuda")(tokens_BT.to("cuda")).logits.cpu()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
