"""Logits against transformers' `MiMoV2FlashForCausalLM`, and proof that the comparison sees the known mistakes.

Their `sliding_window` counts the query's own key (a key is visible when `key > query - sliding_window`), as
`window_keys` does, so the two numbers are equal. A window of one key is left out: their cache then keeps every key.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.model import Cache, MiMoModel
from openmimo.model.moe import Router, Routing

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

BAR = 1e-5  # largest difference of logits of order 1
FAULT_BAR = 1e-4  # a planted fault must exceed this
NUM_TOKENS = 40


@dataclass(frozen=True)
class Shape:
    """What differs between the tested models; sliding layers have twice the KV heads, as transformers fixes it."""

    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    window: int
    top_k: int
    kinds: str  # g and s, one letter per layer
    sparse: str  # d and m
    normalize: bool = True
    scaling: float = 1.0


SHAPES = {
    "odd groups": Shape(6, 1, 16, 12, 7, 2, "gssg", "dmmm"),
    "five heads per group, two keys": Shape(10, 1, 12, 8, 2, 1, "gss", "dmm", normalize=False, scaling=2.0),
    "values wider": Shape(4, 2, 8, 20, 8, 3, "sgs", "mdm", scaling=0.5),
    "long window": Shape(12, 2, 24, 16, 129, 2, "gsssg", "dmmmm"),
    "dense only": Shape(6, 3, 20, 20, 9, 1, "gss", "ddd"),
    "global only": Shape(3, 1, 16, 8, 5, 2, "ggg", "dmm"),
}


@dataclass(frozen=True)
class Pair:
    theirs: torch.nn.Module
    ours: MiMoModel
    tokens_BT: Tensor
    logits_BTV: Tensor


@cache
def build_pair(name: str) -> Pair:
    """Both models with the same weights, all of them random: norms, sinks and router biases too."""
    shape, rng = SHAPES[name], random.Random(name)
    torch.manual_seed(rng.randrange(1 << 30))
    hf_config = transformers.MiMoV2FlashConfig(
        vocab_size=64,
        hidden_size=rng.choice((32, 40, 48)),
        intermediate_size=rng.choice((40, 56)),
        moe_intermediate_size=rng.choice((8, 16, 24)),
        num_hidden_layers=len(shape.kinds),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.qk_dim,
        v_head_dim=shape.v_dim,
        sliding_window=shape.window,
        n_routed_experts=rng.choice((4, 6, 7)),
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=shape.normalize,
        routed_scaling_factor=shape.scaling,
        layer_types=[{"g": "full_attention", "s": "sliding_attention"}[kind] for kind in shape.kinds],
        mlp_layer_types=[{"d": "dense", "m": "sparse"}[kind] for kind in shape.sparse],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
        },
        bos_token_id=None,
        attn_implementation="eager",
    )
    theirs = transformers.MiMoV2FlashForCausalLM(hf_config).eval()
    with torch.no_grad():
        for parameter_name, parameter in (*theirs.named_parameters(), *theirs.named_buffers()):
            if parameter_name.endswith("e_score_correction_bias"):
                parameter.normal_(std=0.2)
            elif parameter_name.endswith("norm.weight"):
                parameter.normal_(mean=1.0, std=0.3)
            elif parameter_name.endswith("sinks"):
                parameter.normal_()
            elif parameter.ndim >= 2:
                parameter.normal_(std=1.0 if "embed" in parameter_name else parameter.shape[-1] ** -0.5)
    ours = MiMoModel(our_config(hf_config))
    copy_weights(theirs, ours)
    tokens_BT = torch.randint(64, (2, NUM_TOKENS))
    with torch.no_grad():
        logits_BTV = theirs(tokens_BT, use_cache=False).logits
    return Pair(theirs, ours, tokens_BT, logits_BTV)


def our_config(hf: object) -> ModelConfig:
    """Field by field, without the package's own readers."""

    def attention(key: str, kv_heads: int, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=hf.num_attention_heads,
            num_kv_heads=kv_heads,
            qk_head_dim=hf.head_dim,
            v_head_dim=hf.v_head_dim,
            rope_theta=hf.rope_parameters[key]["rope_theta"],
            sink=window is not None,
            window_keys=window,
        )

    kinds = {"full_attention": AttentionKind.GLOBAL, "sliding_attention": AttentionKind.SLIDING}
    # A model of global layers only may have heads that twice the KV heads do not divide; nothing uses the entry then.
    sliding_kv = 2 * hf.num_key_value_heads if "sliding_attention" in hf.layer_types else hf.num_key_value_heads
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        dense_dim=hf.intermediate_size,
        layer_kinds=tuple(kinds[kind] for kind in hf.layer_types),
        layer_is_moe=tuple(kind == "sparse" for kind in hf.mlp_layer_types),
        global_attention=attention("full_attention", hf.num_key_value_heads, None),
        sliding_attention=attention("sliding_attention", sliding_kv, hf.sliding_window),
        moe=MoEConfig(
            num_experts=hf.n_routed_experts,
            num_experts_per_token=hf.num_experts_per_tok,
            expert_dim=hf.moe_intermediate_size,
            normalize_weights=hf.norm_topk_prob,
            routed_scaling=hf.routed_scaling_factor,
        ),
        num_mtp_heads=0,
        rope_fraction=0.5,
        value_scale=hf.attention_value_scale,
        norm_eps=hf.rms_norm_eps,
    )


def copy_weights(theirs: torch.nn.Module, ours: MiMoModel) -> None:
    """Stack q/k/v and gate/up; every tensor of both models is used exactly once."""
    source = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name in ours.state_dict():
        if name.endswith("qkv_proj.weight"):
            parts = [name.replace("qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        elif name.endswith("gate_up_proj.weight"):
            parts = [name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
        else:
            parts = [name.replace("attention_sink_bias", "sinks")]
        state[name] = torch.cat([source.pop(part) for part in parts])
    assert not source
    ours.load_state_dict(state)


def greatest_difference(model: MiMoModel, pair: Pair) -> float:
    with torch.no_grad():
        return float((model(pair.tokens_BT).logits - pair.logits_BTV).abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_prefill_matches(name: str) -> None:
    """Any deviation of the architecture, in six shapes that share little."""
    pair = build_pair(name)
    assert 0.3 < float(pair.logits_BTV.std()) < 3.0
    difference = greatest_difference(pair.ours, pair)
    print(f"greatest difference {difference:.1e}")
    assert difference <= BAR


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_with_both_caches_matches(name: str) -> None:
    """A prompt, then token by token: ring, pages and rotary positions against theirs, and theirs against prefill."""
    pair, prompt = build_pair(name), 3
    cache_ours = Cache(pair.ours.config, batch_size=2, step_tokens=1)
    cache_theirs = None
    difference = 0.0
    with torch.no_grad():
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, NUM_TOKENS))]:
            step_BT = pair.tokens_BT[:, start:end]
            ours = pair.ours(step_BT, cache=cache_ours).logits
            cache_ours.commit(end - start)
            result = pair.theirs(step_BT, past_key_values=cache_theirs, use_cache=True)
            cache_theirs = result.past_key_values
            difference = max(difference, float((ours - result.logits).abs().max()))
            difference = max(difference, float((ours - pair.logits_BTV[:, start:end]).abs().max()))
    print(f"greatest difference {difference:.1e}")
    assert difference <= BAR


def _with_config(pair: Pair, config: ModelConfig) -> MiMoModel:
    """Our model under another configuration; sinks that it adds are 0, all shared weights are the same."""
    model = MiMoModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sink_bias"):
                parameter.zero_()
    model.load_state_dict(pair.ours.state_dict(), strict=False)
    return model


def _window(change: int) -> Callable[[ModelConfig], ModelConfig]:
    def changed(config: ModelConfig) -> ModelConfig:
        window = config.sliding_attention.window_keys
        assert window is not None
        return config.replace(sliding_attention=replace(config.sliding_attention, window_keys=window + change))

    return changed


def _swapped_thetas(config: ModelConfig) -> ModelConfig:
    local, whole = config.sliding_attention, config.global_attention
    return config.replace(
        sliding_attention=replace(local, rope_theta=whole.rope_theta),
        global_attention=replace(whole, rope_theta=local.rope_theta),
    )


def _global_sink(config: ModelConfig) -> ModelConfig:
    return config.replace(global_attention=replace(config.global_attention, sink=True))


CONFIG_FAULTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "no value scale": lambda config: config.replace(value_scale=1.0),
    "1/sqrt(2) for 0.707": lambda config: config.replace(value_scale=2**-0.5),
    "window one key short": _window(-1),
    "window one key long": _window(1),
    "swapped rotary bases": _swapped_thetas,
    "sink in global layers": _global_sink,
    "no sink": lambda c: c.replace(sliding_attention=replace(c.sliding_attention, sink=False)),
    "rotary fraction": lambda config: config.replace(rope_fraction=0.334),
    "norm epsilon": lambda config: config.replace(norm_eps=1e-3),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_planted_configuration_fault_is_caught(fault: str) -> None:
    """The comparison above would miss this mistake."""
    pair = build_pair("odd groups")
    broken = _with_config(pair, CONFIG_FAULTS[fault](pair.ours.config))
    assert greatest_difference(_with_config(pair, pair.ours.config), pair) <= BAR
    assert greatest_difference(broken, pair) > FAULT_BAR


def test_bias_in_the_expert_weights_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's bias used for the weights as well as for the choice."""
    pair, right = build_pair("odd groups"), Router.forward

    def biased(router: Router, x_ND: Tensor, *args: Tensor | None) -> Routing:
        routing = right(router, x_ND, *args)
        scores_NE = routing.scores_NE + router.e_score_correction_bias
        weights_Nk = scores_NE.gather(1, routing.experts_Nk)
        return routing._replace(weights_Nk=weights_Nk / weights_Nk.sum(-1, keepdim=True))

    monkeypatch.setattr(Router, "forward", biased)
    assert greatest_difference(pair.ours, pair) > FAULT_BAR


def test_bias_left_out_of_the_choice_is_caught() -> None:
    """The router's bias ignored: other experts are chosen."""
    pair = build_pair("odd groups")
    broken = _with_config(pair, pair.ours.config)
    for router in broken.routers():
        router.e_score_correction_bias.zero_()
    assert greatest_difference(broken, pair) > FAULT_BAR
