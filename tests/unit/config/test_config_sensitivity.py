"""Every field of a model's configuration changes what the model computes, its shapes, or is refused.

Catches a field that is read from a file and then used nowhere, or used in the main layers and forgotten in the heads.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from config_samples import GLOBAL, SLIDING, distinct_config
from torch import Tensor

from openmimo.config.model import AttentionConfig, ModelConfig, MoEConfig
from openmimo.errors import ConfigError
from openmimo.model import build_model

BASE = distinct_config(
    init_std=0.2, tie_embeddings=False, moe=MoEConfig(num_experts=6, num_experts_per_token=2, expert_dim=12)
)
TOKENS = 14

# Perturbed value of each field; `INERT` has those that only other packages look at.
ATTENTION = {
    "num_heads": 12,
    "num_kv_heads": 1,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rope_theta": 50.0,
    "sink": None,
    "window_keys": 6,
}
MOE = {
    "num_experts": 7,
    "num_experts_per_token": 3,
    "expert_dim": 16,
    "normalize_weights": False,
    "routed_scaling": 2.0,
}
MODEL = {
    "vocab_size": 102,
    "hidden_size": 28,
    "dense_dim": 44,
    "layer_kinds": (SLIDING, SLIDING, GLOBAL, GLOBAL),
    "layer_is_moe": (False, False, True, True),
    "moe": None,
    "num_mtp_heads": 3,
    "rope_fraction": 0.85,
    "value_scale": 0.9,
    "norm_eps": 0.05,
    "init_std": 0.1,
    "tie_embeddings": True,
}
INERT = {
    "max_positions": (10, "a limit that the engine keeps; rotary angles are computed for any position"),
    "eos_token_ids": ((1,), "where sampling stops"),
    "pad_token_id": (1, "padding is masked by document ids, not by token"),
    "bos_token_id": (1, "what a tokenizer might put first"),
}
NESTED = {"global_attention", "sliding_attention", "moe"}
REACH_MTP_HEADS = (
    ("value_scale", MODEL["value_scale"]),
    ("norm_eps", MODEL["norm_eps"]),
    ("rope_fraction", MODEL["rope_fraction"]),
    ("sliding_attention.rope_theta", ATTENTION["rope_theta"]),
    ("sliding_attention.window_keys", ATTENTION["window_keys"]),
)


@dataclass(frozen=True)
class Behaviour:
    """Shapes of all tensors, and logits of the main model and of a head on fixed hidden states."""

    shapes: dict[str, tuple[int, ...]]
    logits: Tensor
    head_logits: Tensor


@functools.cache
def behaviour(config: ModelConfig) -> Behaviour:
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            # Zero at the start, they would hide what depends on them.
            if name.endswith(("sink_bias", "correction_bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        ids_BT = torch.randint(0, 90, (2, TOKENS), generator=torch.Generator().manual_seed(2))
        hidden_BTD = torch.randn(2, TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(3))
        output = model(ids_BT)
        head_logits = dataclasses.replace(output, hidden_BTD=hidden_BTD).mtp_logits(0)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return Behaviour(shapes, output.logits, head_logits)


def changed(path: str, value: Any) -> ModelConfig:
    """BASE with the field at a dotted path replaced. `sink` is toggled."""
    part, _, name = path.rpartition(".")
    if not part:
        return BASE.replace(**{name: value})
    inner = getattr(BASE, part)
    value = not inner.sink if name == "sink" else value
    return BASE.replace(**{part: dataclasses.replace(inner, **{name: value})})


def differs(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-4 * float(a.abs().max())


PERTURBED = {
    **MODEL,
    **{f"moe.{name}": value for name, value in MOE.items()},
    **{f"{kind}_attention.{name}": value for kind in ("global", "sliding") for name, value in ATTENTION.items()},
}


def test_every_field_is_perturbed_or_listed_inert() -> None:
    """A new field fails here until it is added to one of the tables above."""
    assert {f.name for f in dataclasses.fields(AttentionConfig)} == ATTENTION.keys()
    assert {f.name for f in dataclasses.fields(MoEConfig)} == MOE.keys()
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    assert fields == MODEL.keys() | INERT.keys() | NESTED
    assert not MODEL.keys() & INERT.keys()


@pytest.mark.parametrize("path", PERTURBED)
def test_field_matters(path: str) -> None:
    base = behaviour(BASE)
    try:
        config = changed(path, PERTURBED[path])
    except ConfigError:
        # Refused values count, but only where no other value of the field could be taken.
        assert path in ("moe", "global_attention.window_keys")
        return
    other = behaviour(config)
    assert other.shapes != base.shapes or differs(base.logits, other.logits)


@pytest.mark.parametrize(("path", "value"), REACH_MTP_HEADS)
def test_field_reaches_the_mtp_heads(path: str, value: Any) -> None:
    """On fixed hidden states, so that a change in the main layers does not count."""
    config = changed(path, value)
    assert differs(behaviour(BASE).head_logits, behaviour(config).head_logits)


@pytest.mark.parametrize("name", INERT)
def test_inert_field_changes_nothing(name: str) -> None:
    """Otherwise it does not belong in the list."""
    value, reason = INERT[name]
    other = behaviour(BASE.replace(**{name: value}))
    assert getattr(BASE, name) != value, reason
    assert other.shapes == behaviour(BASE).shapes
    assert torch.equal(other.logits, behaviour(BASE).logits)
    assert torch.equal(other.head_logits, behaviour(BASE).head_logits)
