"""The name table: every weight exactly once, with the published counts."""

import torch

from openmimo.checkpoint.fp8 import rank_grid, scale_shape
from openmimo.checkpoint.names import hub_tensors, pair_of
from openmimo.config.model import ModelConfig, preset
from openmimo.config.tensor_names import mtp_head_index
from openmimo.model.model import MiMoModel


def test_table_fills_every_element_of_the_model_exactly_once(config: ModelConfig) -> None:
    """Catches a wrong row range, expert index, shape, or a tensor left out."""
    counts = {name: torch.zeros_like(tensor) for name, tensor in MiMoModel(config).state_dict().items()}
    for tensor in hub_tensors(config):
        view = tensor.of(counts[tensor.target])
        assert tuple(view.shape) == tensor.shape, tensor.name
        view += 1
    assert all(bool((count == 1).all()) for count in counts.values())


def test_names_of_one_layer_of_each_kind(config: ModelConfig) -> None:
    names = [tensor.name for tensor in hub_tensors(config)]
    assert len(set(names)) == len(names)
    assert [name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")] == [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.attention_sink_bias",
        "post_attention_layernorm.weight",
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        *(f"mlp.experts.{e}.{part}_proj.weight" for e in range(3) for part in ("gate", "up", "down")),
    ]
    assert "model.layers.0.self_attn.attention_sink_bias" not in names
    assert "model.mtp.layers.1.eh_proj.weight" in names


def test_stacking_order_is_q_k_v_and_gate_before_up(config: ModelConfig) -> None:
    """Saving and loading would agree with each other even if both had the order wrong."""
    rows = {tensor.name.removeprefix("model.layers.1."): tensor.rows for tensor in hub_tensors(config)}
    assert [rows[f"self_attn.{part}_proj.weight"] for part in "qkv"] == [(0, 48), (48, 72), (72, 88)]
    assert [rows[f"mlp.experts.2.{part}_proj.weight"] for part in ("gate", "up", "down")] == [(0, 16), (16, 32), None]
    assert [rows[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")] == [(0, 48), (48, 96)]


def test_tied_embeddings_have_no_separate_head(config: ModelConfig) -> None:
    names = [tensor.name for tensor in hub_tensors(config.replace(tie_embeddings=True))]
    assert "lm_head.weight" not in names


def test_published_checkpoint_size_to_the_byte_of_an_mtp_module() -> None:
    """309.785 B numbers with scales, 15 and 12 tensors in the first two layer files, 396466816 bytes per MTP module."""
    flash = preset("flash")
    grid = rank_grid(flash.global_attention)
    assert grid is not None
    total, mtp_bytes, layer_tensors = 0, 0, {"model.layers.0.": 0, "model.layers.1.": 0}
    for tensor in hub_tensors(flash):
        size = torch.Size(tensor.shape).numel()
        scales = torch.Size(scale_shape(tensor.shape)).numel() if tensor.fp8 else 0
        if tensor.pair is not None and tensor.is_key:
            scales = grid.num_ranks * grid.k_blocks * 32
        total += size + scales
        if tensor.name.startswith("model.mtp.layers.2."):
            mtp_bytes += size + 4 * scales if tensor.fp8 else 2 * size
        for prefix in layer_tensors:
            if tensor.name.startswith(prefix) and ".experts." not in tensor.name:
                layer_tensors[prefix] += 2 if tensor.fp8 else 1
    assert round(total / 1e9, 3) == 309.785
    assert mtp_bytes == 396_466_816
    assert layer_tensors == {"model.layers.0.": 15, "model.layers.1.": 12}


def test_pairs_are_global_k_and_v_of_one_layer(config: ModelConfig) -> None:
    by_name = {tensor.name: tensor for tensor in hub_tensors(config)}
    paired = [tensor for tensor in by_name.values() if tensor.pair is not None]
    assert {tensor.name.split(".")[2] for tensor in paired} == {"0", "2"}
    assert len(paired) == 4
    for tensor in paired:
        assert pair_of(config, tensor) == by_name[str(tensor.pair)]
        assert pair_of(config, pair_of(config, tensor)) == tensor


def test_mtp_head_index_accepts_only_head_names() -> None:
    assert mtp_head_index("model.mtp.layers.2.enorm.weight") == 2
    for name in ("model.layers.2.enorm.weight", "model.mtp.layers.x.y", "model.mtp.layers.999999999999.a"):
        assert mtp_head_index(name) is None
