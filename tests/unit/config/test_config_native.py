"""transformers' own keys: what that library would build, no more and no less."""

import dataclasses
import json
import random
from typing import Any

import pytest
from config_samples import distinct_config, random_config

from openmimo.config.hub import to_hub
from openmimo.config.model import AttentionKind, ModelConfig, preset, preset_names
from openmimo.config.native import DEFAULTS, IGNORED, from_native, read_native, to_native, write_native
from openmimo.errors import ConfigError


def native_sample() -> dict[str, Any]:
    return to_native(preset("nano"), quantized=True, extra={"dtype": "bfloat16"})


def rope(**changes: object) -> dict[str, Any]:
    both = native_sample()["rope_parameters"]
    return {**both, "sliding_attention": {**both["sliding_attention"], **changes}}


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip(name: str) -> None:
    assert from_native(json.loads(json.dumps(to_native(preset(name), quantized=True)))) == preset(name)


def test_any_expressible_model_round_trips() -> None:
    rng = random.Random(1)
    for config in (random_config(rng, native=True) for _ in range(200)):
        assert from_native(json.loads(json.dumps(to_native(config)))) == config


def test_window_counts_the_querys_own_key() -> None:
    """`sliding_window` as it stands; `sliding_window_size` plus one, as transformers does; 129 without either."""
    data = native_sample()
    assert from_native({**data, "sliding_window": 7}).sliding_attention.window_keys == 7
    assert from_native({**data, "sliding_window": 7, "sliding_window_size": 9}).sliding_attention.window_keys == 10
    del data["sliding_window"]
    assert from_native(data).sliding_attention.window_keys == 129


def test_sliding_layers_have_twice_the_heads_and_the_sinks() -> None:
    config = from_native({**native_sample(), "num_key_value_heads": 2})
    assert (config.global_attention.num_kv_heads, config.sliding_attention.num_kv_heads) == (2, 4)
    assert (config.global_attention.sink, config.sliding_attention.sink) == (False, True)


@pytest.mark.parametrize("key", sorted(DEFAULTS.keys() | {"rope_parameters", "layer_types", "mlp_layer_types"}))
def test_every_key_is_spelled_out(key: str) -> None:
    """So that no default of another transformers version can change the model."""
    assert key in native_sample()


def test_files_come_back_whole() -> None:
    data = {**native_sample(), "_name_or_path": "x", "eos_token_id": [3], "id2label": {"0": "a"}}
    assert write_native(read_native(data)) == data
    file = read_native(data)
    changed = dataclasses.replace(file, model=file.model.replace(eos_token_ids=(4,)))
    assert from_native(write_native(changed)).eos_token_ids == (4,)


def _sliding(**changes: Any) -> ModelConfig:
    config = preset("nano")
    return config.replace(sliding_attention=dataclasses.replace(config.sliding_attention, **changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_sliding(num_kv_heads=1), "not twice the 1"),
        (_sliding(num_heads=8), "query heads"),
        (_sliding(qk_head_dim=64), "QK head sizes"),
        (_sliding(v_head_dim=64), "V head sizes"),
        (_sliding(sink=False), "no sink"),
        (
            distinct_config(global_attention=dataclasses.replace(distinct_config().global_attention, sink=True)),
            "a sink",
        ),
        (preset("nano").replace(rope_fraction=0.35), "odd"),
        (
            preset("nano").replace(
                moe=dataclasses.replace(preset("nano").moe, num_experts=1, num_experts_per_token=1)  # type: ignore[type-var]
            ),
            "two experts",
        ),
    ],
)
def test_models_that_transformers_cannot_express_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_native(config)


BAD: list[tuple[str, Any, str]] = [
    ("layer_types", ["full_attention"] * 5, "num_hidden_layers is 6"),
    ("layer_types", ["full_attention"] * 5 + ["chunked"], "must be 'full_attention' or 'sliding_attention'"),
    ("layer_types", [0] * 6, "must be"),
    ("mlp_layer_types", ["moe"] * 6, "must be 'dense' or 'sparse'"),
    ("rope_parameters", rope(rope_type="yarn"), "sliding_attention.rope_type"),
    ("rope_parameters", rope(rope_theta=None), "sliding_attention.rope_theta"),
    ("rope_parameters", rope(partial_rotary_factor=0.25), "different partial_rotary_factor"),
    ("rope_parameters", rope(factor=2), "rope_parameters.sliding_attention.factor"),
    ("rope_parameters", {}, "full_attention is missing"),
    ("rope_parameters", [], "must be an object"),
    ("sliding_window", None, "whole number"),
    ("sliding_window_size", 0, "at least 1"),
    ("num_key_value_heads", 4, "must divide"),
    ("rms_norm_eps", "x", "finite"),
    ("head_dim", 34, "odd"),
    ("n_group", 2, "only 1"),
    ("n_routed_experts", 0, "at least 1"),
    ("layernorm_epsilon", 1e-6, "contradicts the native keys"),
    ("hybrid_layer_pattern", [1] * 6, "contradicts the native keys"),
    ("swa_num_key_value_heads", 1, "contradicts the native keys"),
    ("scoring_func", "softmax", "sigmoid"),
    ("rms_norm_epsilon", 1e-5, "did you mean 'rms_norm_eps'"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{key}-{i}" for i, (key, _, _) in enumerate(BAD)])
def test_bad_values_are_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_native({**native_sample(), key: value})


def test_leftover_hub_keys_that_agree_are_harmless() -> None:
    """transformers carries unknown keys along, so a Hub file that it loaded and saved has both spellings."""
    hub = to_hub(preset("nano"))
    data = {**hub, **native_sample(), "sliding_window_size": 63}
    assert from_native(data) == preset("nano")


def test_every_ignored_key_has_no_effect() -> None:
    for key in IGNORED:
        assert from_native({**native_sample(), key: [{"a": None}]}) == preset("nano")


def test_kinds_that_no_layer_has_need_no_rope_entry() -> None:
    data = native_sample()
    data["layer_types"] = ["full_attention"] * 6
    del data["rope_parameters"]["sliding_attention"]
    assert set(from_native(data).layer_kinds) == {AttentionKind.GLOBAL}
    assert from_native(data).sliding_attention.rope_theta == 1e4


@pytest.fixture(scope="module")
def theirs() -> Any:
    """The configuration class of the installed library."""
    return pytest.importorskip("transformers.models.mimo_v2_flash").MiMoV2FlashConfig


@pytest.mark.parity
def test_defaults_are_those_of_the_class(theirs: Any) -> None:
    """A new release that changes a default must not change what a file without the key means here."""
    default = theirs().to_dict()
    assert {key: default[key] for key in DEFAULTS} == DEFAULTS
    assert from_native({"layer_types": None}) == from_native(default)


@pytest.mark.parity
@pytest.mark.parametrize("name", preset_names())
def test_the_class_takes_our_keys_unchanged(theirs: Any, name: str) -> None:
    """No key is renamed, defaulted or converted on the way, so the library builds exactly our model."""
    data = to_native(preset(name))
    config = theirs.from_dict(data)
    assert {key: getattr(config, key) for key in data if key != "architectures"} == {
        key: value for key, value in data.items() if key != "architectures"
    }
    assert from_native(config.to_dict()) == preset(name)
    assert from_native(json.loads(config.to_json_string())) == preset(name)


@pytest.mark.parity
def test_constructed_configurations_are_read(theirs: Any) -> None:
    config = theirs(num_hidden_layers=3, sliding_window=17, routed_scaling_factor=None, tie_word_embeddings=True)
    ours = from_native(config.to_dict())
    assert [kind.value for kind in ours.layer_kinds] == ["global", "sliding", "sliding"]
    assert (ours.sliding_attention.window_keys, ours.tie_embeddings, ours.num_mtp_heads) == (17, True, 0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_hub_file_that_went_through_transformers(theirs: Any) -> None:
    """There the window grows by one; everything else of the published model stays."""
    ours = from_native(theirs(**to_hub(preset("flash"))).to_dict())
    flash = preset("flash")
    assert ours == flash.replace(sliding_attention=dataclasses.replace(flash.sliding_attention, window_keys=129))
