"""The Hub's config.json: read strictly, written back without loss."""

import dataclasses
import json
import random
from typing import Any

import pytest
from config_samples import PUBLISHED, distinct_config, hub_sample, random_config

from openmimo.config.hub import FIXED, IGNORED, from_hub, read_hub, to_hub, write_hub
from openmimo.config.model import ModelConfig, preset, preset_names
from openmimo.config.quantization import Fp8Quantization
from openmimo.errors import ConfigError


def test_published_file_is_flash() -> None:
    """Every key of the published file is understood, and the result is the preset but for the stop tokens."""
    assert from_hub(PUBLISHED) == preset("flash").replace(eos_token_ids=())


def test_published_file_comes_back_whole() -> None:
    """With each key at its value, spelling included; only the number of MTP heads is added."""
    written = write_hub(read_hub(PUBLISHED))
    assert {key: written[key] for key in PUBLISHED} == PUBLISHED
    assert written.keys() - PUBLISHED.keys() == {
        "num_nextn_predict_layers",
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
    }
    assert json.dumps(written["rope_theta"]) == "5000000"


def test_a_quantised_flash_is_written_as_published() -> None:
    """The values that other engines read are those of the published file, quantisation included."""
    written = to_hub(preset("flash"), quantized=True)
    left_out = {"auto_map", "use_cache", "attention_chunk_size", "torch_dtype", "transformers_version"}
    assert left_out <= IGNORED.keys()
    assert {key: written[key] for key in PUBLISHED.keys() - left_out} == {
        key: PUBLISHED[key] for key in PUBLISHED.keys() - left_out
    }


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip(name: str) -> None:
    assert from_hub(json.loads(json.dumps(to_hub(preset(name), quantized=True)))) == preset(name)


def test_any_model_round_trips() -> None:
    """Catches a key that is written from one field and read into another, or dropped: no value equals another's."""
    rng = random.Random(0)
    for config in (distinct_config(), *(random_config(rng) for _ in range(200))):
        assert from_hub(json.loads(json.dumps(to_hub(config)))) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("routed_scaling_factor", 1.0),
        ("routed_scaling_factor", None),
        ("rope_theta", 7),
        ("eos_token_id", [5]),
        ("eos_token_id", 5),
        ("attention_value_scale", None),
        ("model_type", ""),
        ("n_shared_experts", 0),
        ("moe_router_dtype", "float32"),
        ("id2label", {"0": [1, {"x": None}]}),
        ("quantization_config", None),
    ],
)
def test_other_spellings_are_kept(key: str, value: object) -> None:
    data = {**hub_sample(), key: value}
    assert write_hub(read_hub(data)) == data


def test_spellings_of_a_model_that_changed_are_dropped() -> None:
    """A kept `null` must not come back as the scale of a model whose scale is now 2."""
    file = read_hub({**hub_sample(), "routed_scaling_factor": 1.0, "_name_or_path": "x"})
    assert file.model.moe is not None
    changed = file.model.replace(moe=dataclasses.replace(file.model.moe, routed_scaling=2.0))
    written = write_hub(dataclasses.replace(file, model=changed))
    assert from_hub(written) == changed
    assert written["_name_or_path"] == "x"


def test_kept_values_do_not_alias_the_input() -> None:
    data = {**hub_sample(), "auto_map": {"AutoConfig": "x"}}
    file = read_hub(data)
    data["auto_map"]["AutoConfig"] = "y"
    assert file.kept["auto_map"] == {"AutoConfig": "x"}


def test_heads_are_three_where_the_file_does_not_say() -> None:
    """The published files hold three heads and no key for them; where there is a key it counts."""
    data = hub_sample()
    for value, heads in ((0, 0), (1, 1), (None, 3)):
        assert from_hub({**data, "num_nextn_predict_layers": value}).num_mtp_heads == heads
    del data["num_nextn_predict_layers"]
    assert from_hub(data).num_mtp_heads == 3


@pytest.mark.parametrize("missing", ["sliding_window", "sliding_window_size"])
def test_one_window_key_is_enough(missing: str) -> None:
    """The window counts the query's own key, so it is taken as it stands."""
    data = hub_sample()
    del data[missing]
    assert from_hub(data).sliding_attention.window_keys == data["sliding_window" + "_size" * (missing[-1] == "w")]


@pytest.mark.parametrize("key", sorted(to_hub(preset("nano")).keys() - FIXED.keys() - IGNORED.keys()))
def test_a_missing_key_is_an_error_or_has_its_documented_meaning(key: str) -> None:
    """Nothing that shapes the model may fall back to a silent default."""
    data = hub_sample()
    del data[key]
    may_be_absent = {
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "routed_scaling_factor",
        "num_nextn_predict_layers",
        "sliding_window",
        "sliding_window_size",
    }
    if key in may_be_absent:
        assert from_hub(data) == preset("nano")
    else:
        with pytest.raises(ConfigError, match=key):
            from_hub(data)


BAD: list[tuple[str, Any, str]] = [
    ("hidden_size", True, "whole number"),
    ("hidden_size", 128.0, "whole number"),
    ("hidden_size", "128", "whole number"),
    ("hidden_size", 0, "at least 1"),
    ("hidden_size", -4, "at least 1"),
    ("hidden_size", 2**31, "at most"),
    ("num_hidden_layers", True, "num_hidden_layers=True must be a whole number"),
    ("layernorm_epsilon", float("nan"), "layernorm_epsilon=nan must be a finite number"),
    ("layernorm_epsilon", 0, "norm_eps"),
    ("rope_theta", float("inf"), "finite"),
    ("rope_theta", 10**400, "finite"),
    ("rope_theta", False, "finite"),
    ("tie_word_embeddings", 0, "true or false"),
    ("add_swa_attention_sink_bias", None, "true or false"),
    ("hybrid_layer_pattern", [0, 1], "num_hidden_layers is 6"),
    ("hybrid_layer_pattern", [0, 1, 1, 1, 1, 2], r"\[5\]=2"),
    ("hybrid_layer_pattern", [0, 1, 1, 1, 1, True], r"\[5\]=True"),
    ("hybrid_layer_pattern", 1, "must be a list"),
    ("moe_layer_freq", 1, "must be a list"),
    ("moe_layer_freq", [[0]] * 6, "must be 0 or 1"),
    ("sliding_window", 63, "differ"),
    ("n_shared_experts", 1, "shared expert"),
    ("n_group", 2, "only 1"),
    ("n_group", True, "only 1"),
    ("topk_group", 4, "only 1"),
    ("scoring_func", "softmax", 'only "sigmoid"'),
    ("topk_method", "greedy", "noaux_tc"),
    ("rope_scaling", {"type": "yarn"}, "only null"),
    ("attention_bias", True, "no bias"),
    ("attention_dropout", 0.1, "no dropout"),
    ("hidden_act", "gelu", "SwiGLU"),
    ("model_type", "mimo_v2", "successors"),
    ("moe_router_dtype", "bfloat16", "router"),
    ("n_routed_experts", None, "n_routed_experts"),
    ("num_experts_per_tok", 9, "exceeds"),
    ("routed_scaling_factor", "1", "finite"),
    ("eos_token_id", [1, "x"], "whole number"),
    ("eos_token_id", [True], "whole number"),
    ("pad_token_id", False, "whole number"),
    ("eos_token_id", 10**6, "outside the vocabulary"),
    ("pad_token_id", -1, "at least 0"),
    ("num_nextn_predict_layers", -1, "at least 0"),
    ("num_key_value_heads", 3, "must divide"),
    ("partial_rotary_factor", 1.5, "rope_fraction"),
    ("slidng_window", 64, "did you mean 'sliding_window'"),
    ("zzz", 1, "unknown key 'zzz'"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{key}-{i}" for i, (key, _, _) in enumerate(BAD)])
def test_bad_values_are_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_hub({**hub_sample(), key: value})
    assert len(str(caught.value)) < 300


def test_global_sinks_are_supported() -> None:
    assert from_hub({**hub_sample(), "add_full_attention_sink_bias": True}).global_attention.sink is True


def test_quantisation_is_read_and_written() -> None:
    file = read_hub(hub_sample())
    names = tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(6))
    assert file.quantization == Fp8Quantization(ignored_layers=(*names, "model.decoder.self_attn.o_proj"))
    assert read_hub(to_hub(preset("nano"))).quantization is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_method", "gptq", 'only "fp8"'),
        ("fmt", "e5m2", "E4M3"),
        ("activation_scheme", "static", "activation scales"),
        ("weight_block_size", [128], "128 x 128"),
        ("weight_block_size", None, "128 x 128"),
        ("ignored_layers", "all", "list of names"),
        ("ignored_layers", [1], "list of names"),
        ("modules_to_not_convert", ["other"], "different lists"),
        ("scale_fmt", "ue8m0", "fp32"),
        ("expert_dtype", "fp4", "E4M3"),
        ("ignored_layer", [], "did you mean 'ignored_layers'"),
    ],
)
def test_other_number_formats_are_refused(key: str, value: object, message: str) -> None:
    data = hub_sample()
    with pytest.raises(ConfigError, match=f"quantization_config.*{message}"):
        from_hub({**data, "quantization_config": {**data["quantization_config"], key: value}})


def test_quantisation_by_the_other_name_for_its_list() -> None:
    """transformers writes `modules_to_not_convert` and no `fmt`."""
    table = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    data = {**hub_sample(), "quantization_config": {**table, "dequantize": False}}
    file = read_hub(data)
    assert file.quantization == Fp8Quantization(ignored_layers=("lm_head",))
    assert write_hub(file) == data
    for broken in ({}, {"quant_method": "fp8"}, [], "fp8"):
        with pytest.raises(ConfigError, match="quantization_config"):
            from_hub({**hub_sample(), "quantization_config": broken})


def test_extra_keys_must_not_change_the_model() -> None:
    assert to_hub(preset("nano"), extra={"torch_dtype": "float32"})["torch_dtype"] == "float32"
    with pytest.raises(ConfigError, match="hidden_size"):
        to_hub(preset("nano"), extra={"hidden_size": 4})


def test_every_ignored_key_has_a_reason_and_no_effect() -> None:
    for key, reason in IGNORED.items():
        assert len(reason) > 10
        assert from_hub({**hub_sample(), key: {"anything": [1, None]}}) == preset("nano")


def test_dense_models_need_no_expert_keys() -> None:
    dense = ModelConfig(**{**vars(distinct_config()), "layer_is_moe": (False,) * 4, "moe": None})
    data = to_hub(dense)
    for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
        del data[key]
    assert from_hub(data) == dense
