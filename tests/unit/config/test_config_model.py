"""ModelConfig refuses what no model can be built from."""

import math

import pytest
from config_samples import distinct_config

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig, preset, preset_names
from openmimo.errors import ConfigError

BAD_SIZES = (0, -1, 1.0, True, "8", None, 2**31, pytest.param(10**5000, id="huge"))
BAD_NUMBERS = (math.nan, math.inf, -math.inf, "1", None, True, pytest.param(10**400, id="huge"))


def attention(**changes: object) -> AttentionConfig:
    return AttentionConfig(**{**vars(distinct_config().sliding_attention), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", BAD_SIZES)
@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "dense_dim", "max_positions"])
def test_model_sizes_are_positive_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        distinct_config(**{name: value})


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["norm_eps", "init_std", "value_scale", "rope_fraction"])
def test_model_numbers_are_finite(name: str, value: object) -> None:
    """A nan in particular: it passes every `value <= 0` check."""
    with pytest.raises(ConfigError, match=name):
        distinct_config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_kinds": ()}, "layer_kinds is empty"),
        ({"layer_is_moe": (True,)}, "layer_is_moe has 1"),
        ({"moe": None}, "moe is None"),
        ({"num_mtp_heads": -1}, "num_mtp_heads"),
        ({"num_mtp_heads": True}, "num_mtp_heads"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"rope_fraction": 1.2}, "rope_fraction"),
        ({"rope_fraction": -0.01}, "rope_fraction"),
        ({"global_attention": attention()}, "global_attention.window_keys"),
        ({"sliding_attention": distinct_config().global_attention}, "sliding_attention.window_keys"),
        ({"eos_token_ids": (101,)}, "token id 101"),
        ({"pad_token_id": -1}, "token id -1"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        distinct_config(**changes)


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 0.0, -1.0])
def test_rope_theta_is_above_zero(value: object) -> None:
    with pytest.raises(ConfigError, match="rope_theta"):
        attention(rope_theta=value)


def test_key_value_heads_divide_query_heads() -> None:
    with pytest.raises(ConfigError, match="must divide"):
        attention(num_kv_heads=3)


@pytest.mark.parametrize(("name", "value"), [("num_experts_per_token", 12), ("routed_scaling", math.nan)])
def test_moe_values_are_checked(name: str, value: object) -> None:
    assert isinstance(distinct_config().moe, MoEConfig)
    with pytest.raises(ConfigError, match=name):
        MoEConfig(**{**vars(distinct_config().moe), name: value})  # type: ignore[arg-type]


def test_presets_follow_the_report() -> None:
    """The layer pattern and the shape of the published model, written out here once more."""
    flash = preset("flash")
    wide = [i for i, kind in enumerate(flash.layer_kinds) if kind is AttentionKind.GLOBAL]
    assert wide == [0, 5, 11, 17, 23, 29, 35, 41, 47]
    assert flash.layer_is_moe == (False,) + (True,) * 47
    assert flash.rotary_dim(AttentionKind.GLOBAL) == flash.rotary_dim(AttentionKind.SLIDING) == 64
    assert set(preset_names()) == {"nano", "tiny", "small", "medium", "flash"}


def test_from_pretrained_knows_presets_and_unknown_names_get_a_hint() -> None:
    assert ModelConfig.from_pretrained("tiny") == preset("tiny")
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        ModelConfig.from_pretrained("smal")
    with pytest.raises(ConfigError, match="did you mean 'nano'"):
        preset("nanoo")
