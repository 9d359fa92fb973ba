"""Costs against figures that were counted elsewhere: the published checkpoint, and engines' own reports."""

import pytest
import torch
from config_samples import distinct_config

from openmimo.config.cost import (
    count_active,
    count_parameters,
    decode_step_bytes,
    forward_flops,
    kv_cache_bytes,
    prefill_flops,
    training_flops,
    weight_bytes,
)
from openmimo.config.model import ModelConfig, preset
from openmimo.errors import ConfigError
from openmimo.model.model import MiMoModel


def test_flash_has_the_published_number_of_entries() -> None:
    """309.785 billion with three MTP heads and FP8 scales, the total that the Hub reports."""
    flash = preset("flash")
    assert round(count_parameters(flash, fp8_scales=True).total, -6) == 309_785_000_000
    assert round(count_parameters(flash, fp8_scales=True, mtp_heads=0).total, -6) == 308_797_000_000
    assert round(count_parameters(flash, fp8_scales=True, mtp_heads=1).total, -6) == 309_127_000_000
    assert count_parameters(flash, mtp_heads=1).mtp == 329_273_408


def test_flash_components_are_those_of_the_checkpoint() -> None:
    count = count_parameters(preset("flash"))
    shares = {name: round(value / 1e9, 2) for name, value in vars(count).items()}
    assert shares["experts"] == 302.80
    assert (shares["sliding_attention"], shares["global_attention"]) == (3.68, 0.80)
    assert round((count.embedding + count.output_head) / 1e9, 2) == 1.25
    assert (shares["dense"], shares["router"]) == (0.20, 0.05)
    assert count.scales == 0


def test_flash_activates_15_billion() -> None:
    assert round(count_active(preset("flash"), with_embedding=True).total / 1e9, 2) == 15.45


def test_flash_bytes_are_those_of_the_published_files() -> None:
    """Byte-exact for one MTP head, whose tensors are all known; 313 GB in total."""
    flash = preset("flash")
    assert weight_bytes(flash, "fp8", mtp_heads=1) - weight_bytes(flash, "fp8", mtp_heads=0) == 396_466_816
    assert round(weight_bytes(flash, "fp8") / 1e9, 2) == 313.05
    assert round(weight_bytes(flash, "fp8", mtp_heads=1) / 1e9, 2) == 312.26


@pytest.mark.parametrize(
    ("name", "millions", "active", "cache_mb"),
    [("tiny", 22.7, 6.5, 32), ("small", 704, 186, 129), ("medium", 4190, 1060, 345)],
)
def test_smaller_presets_match_independent_counts(name: str, millions: float, active: float, cache_mb: float) -> None:
    """Parameters and active parameters without MTP heads, and the KV cache at 32k tokens in bf16."""
    config = preset(name)
    assert count_parameters(config, mtp_heads=0).total / 1e6 == pytest.approx(millions, rel=0.003)
    assert count_active(config).total / 1e6 == pytest.approx(active, rel=0.004)
    assert kv_cache_bytes(config, 32768).total / 1e6 == pytest.approx(cache_mb, rel=0.007)


@pytest.mark.parametrize(
    "config",
    [
        distinct_config(tie_embeddings=False),
        distinct_config(),
        distinct_config(num_mtp_heads=0),
        preset("nano"),
        preset("medium"),
    ],
    ids=["untied", "tied", "no-heads", "nano", "medium"],
)
def test_counts_are_those_of_the_model(config: ModelConfig) -> None:
    """Every tensor of the model is counted once, and fp32 and bf16 sizes follow."""
    with torch.device("meta"):
        model = MiMoModel(config)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    entries = sum(tensor.numel() for tensor in tensors)
    assert count_parameters(config).total == entries
    assert weight_bytes(config, "fp32") == 4 * entries
    assert weight_bytes(config, "bf16") == 2 * entries + 2 * count_parameters(config).router


def test_active_entries_leave_out_idle_experts_and_the_embedding() -> None:
    config = distinct_config(tie_embeddings=False)
    everything, active = count_parameters(config), count_active(config, mtp_heads=2)
    assert everything.experts * 2 == active.experts * 11
    assert everything.total - active.total == everything.embedding + everything.experts - active.experts
    assert count_active(config, mtp_heads=2, with_embedding=True).embedding == 101 * 24


def test_cache_counts_window_and_draft_slots() -> None:
    config = distinct_config()
    wide, sliding = 3 * (10 + 7), 4 * (12 + 9)
    assert kv_cache_bytes(config, 100, 2, 3, mtp_heads=1) == kv_cache_bytes(
        config, length=100, bytes_per_value=2, draft_slots=3, mtp_heads=1
    )
    cost = kv_cache_bytes(config, 100, 2, 3, mtp_heads=1)
    assert (cost.global_layers, cost.sliding_layers, cost.mtp_heads) == (
        2 * 100 * wide * 2,
        2 * 8 * sliding * 2,
        8 * sliding * 2,
    )
    assert kv_cache_bytes(config, 4).total == 2 * (2 * 4 * wide + 2 * 4 * sliding)
    assert kv_cache_bytes(config, 0).total == 0


def test_flops_against_a_count_by_hand() -> None:
    """Two FLOPs per weight and per key dimension; sliding layers stop growing at the window."""
    config = distinct_config(tie_embeddings=False, num_mtp_heads=0)
    count = count_active(config)
    sinks, bias = 2 * 8, 2 * 11
    weights = count.total - count.norms - sinks - bias
    per_key_wide, per_key_sliding = 2 * 2 * 6 * (10 + 7), 2 * 2 * 8 * (12 + 9)
    assert forward_flops(config, 3) == 2 * weights + 3 * (per_key_wide + per_key_sliding)
    assert forward_flops(config, 100) == 2 * weights + 100 * per_key_wide + 5 * per_key_sliding


@pytest.mark.parametrize("length", [1, 4, 5, 6, 50])
def test_training_flops_are_three_forwards_averaged(length: int) -> None:
    config = distinct_config()
    mean = sum(forward_flops(config, t, mtp_heads=1) for t in range(1, length + 1)) / length
    assert training_flops(config, length, mtp_heads=1) == pytest.approx(3 * mean, abs=3)


def test_mtp_heads_cost_their_layer_and_one_output_projection() -> None:
    config = distinct_config(tie_embeddings=False)
    head = count_parameters(config, mtp_heads=1).mtp - 5 * 24 - 8
    attended = 2 * 8 * (12 + 9) * 4
    assert forward_flops(config, 4, mtp_heads=1) - forward_flops(config, 4) == 2 * (head + 101 * 24) + attended


def test_impossible_questions_are_refused() -> None:
    for ask in (
        lambda: forward_flops(preset("nano"), 0),
        lambda: kv_cache_bytes(preset("nano"), -1),
        lambda: count_parameters(preset("nano"), mtp_heads=-1),
        lambda: weight_bytes(preset("nano"), "fp16"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            ask()


def test_a_decoding_step_reads_the_experts_that_its_tokens_choose() -> None:
    """The figures of an independent table: one token reads the active weights, 32 tokens nearly all experts."""
    small = preset("small")
    one = decode_step_bytes(small, batch_size=1, context_tokens=1)
    # Norms are not in it, and the router is counted in fp32.
    assert one == pytest.approx(2 * count_active(small).total, rel=0.005)
    experts = count_parameters(small, mtp_heads=0).experts
    shared = one - 2 * experts * 4 / 32
    read = 1 - (1 - 4 / 32) ** 32
    many = decode_step_bytes(small, batch_size=32, context_tokens=1)
    assert many == pytest.approx(shared + 2 * experts * read, rel=0.005)
    longer = decode_step_bytes(small, batch_size=3, context_tokens=1000, cache_bytes_per_value=1)
    shorter = decode_step_bytes(small, batch_size=3, context_tokens=0)
    assert longer - shorter == 3 * kv_cache_bytes(small, 1000, 1).total
    assert decode_step_bytes(small, batch_size=1, context_tokens=1, weight_bits=8.5) < 0.55 * one
    with pytest.raises(ConfigError, match="batch_size=0"):
        decode_step_bytes(small, batch_size=0, context_tokens=1)


def test_a_prompt_pays_for_one_row_of_logits() -> None:
    """The output head counted for every token of the prompt."""
    tiny = preset("tiny")
    head = 2 * tiny.vocab_size * tiny.hidden_size
    assert prefill_flops(tiny, 1) == forward_flops(tiny, 1)
    assert prefill_flops(tiny, 300) == pytest.approx(sum(forward_flops(tiny, i + 1) for i in range(300)) - 299 * head)
