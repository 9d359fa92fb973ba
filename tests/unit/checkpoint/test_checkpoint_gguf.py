"""GGUF export: blocks, names, hyper-parameters and vocabulary, read back by the `gguf` package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from openmimo.checkpoint.convert import CheckpointSource
from openmimo.checkpoint.gguf import convert_to_gguf, save_gguf
from openmimo.checkpoint.gguf_file import encode
from openmimo.checkpoint.names import HubTensor
from openmimo.checkpoint.save import save_model
from openmimo.config.model import ModelConfig
from openmimo.errors import CheckpointError, ConfigError
from openmimo.model.model import MiMoModel
from openmimo.text import Tokenizer, train_tokenizer

MakeModel = Callable[[ModelConfig], MiMoModel]


@pytest.fixture(scope="module")
def gguf() -> ModuleType:
    return pytest.importorskip("gguf")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_tokenizer(["to be, or not to be; that is the question"] * 3, vocab_size=280)


def read(gguf: ModuleType, path: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return {field.name: field.contents() for field in reader.fields.values()}, tensors


def test_a_block_of_8_bits_by_hand() -> None:
    """Halves rounded to even, a scale that is not the greatest over 127, or a division by zero."""
    x = torch.zeros(2, 32)
    x[0, :6] = torch.tensor([127.0, 2.5, -2.5, 0.5, 1.49, -127.0])
    scale_and_values = encode(x, "q8_0").reshape(2, 34)
    assert scale_and_values[0, :2].view(np.float16)[0] == 1.0
    assert scale_and_values[0, 2:8].view(np.int8).tolist() == [127, 3, -3, 1, 1, -127]
    assert not scale_and_values[1].any()


def test_8_bit_blocks_are_those_of_the_gguf_package(gguf: ModuleType) -> None:
    x = torch.randn(64, 96)
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(encode(x, "q8_0"), theirs.reshape(-1))


def test_every_weight_arrives_under_its_name(
    gguf: ModuleType, tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    """q, k and v in another order, experts of another layer, a head in the place of a layer, gate and up swapped."""
    model = make_model(config)
    save_gguf(model, tmp_path / "m.gguf", dtype="float32")
    metadata, tensors = read(gguf, tmp_path / "m.gguf")
    ours = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    expected = {
        "token_embd.weight": ours["embed_tokens.weight"],
        "output.weight": ours["lm_head.weight"],
        "blk.1.attn_qkv.weight": ours["layers.1.self_attn.qkv_proj.weight"],
        "blk.1.attn_sinks.weight": ours["layers.1.self_attn.attention_sink_bias"],
        "blk.2.ffn_norm.weight": ours["layers.2.post_attention_layernorm.weight"],
        "blk.2.exp_probs_b.bias": ours["layers.2.mlp.gate.e_score_correction_bias"],
        "blk.2.ffn_gate_exps.weight": ours["layers.2.mlp.experts.gate_up_proj"][:, :16],
        "blk.2.ffn_up_exps.weight": ours["layers.2.mlp.experts.gate_up_proj"][:, 16:],
        "blk.2.ffn_down_exps.weight": ours["layers.2.mlp.experts.down_proj"],
        "blk.4.nextn.eh_proj.weight": ours["mtp_heads.1.eh_proj.weight"],
        "blk.4.nextn.shared_head_norm.weight": ours["mtp_heads.1.final_layernorm.weight"],
        "blk.4.ffn_norm.weight": ours["mtp_heads.1.pre_mlp_layernorm.weight"],
        "blk.4.ffn_up.weight": ours["mtp_heads.1.mlp.gate_up_proj.weight"][48:],
    }
    for name, tensor in expected.items():
        assert np.array_equal(tensors[name], tensor), name
    assert sum(tensor.size for tensor in tensors.values()) == sum(tensor.size for tensor in ours.values())
    assert metadata["mimo2.block_count"] == 5
    assert metadata["mimo2.nextn_predict_layers"] == 2
    assert metadata["mimo2.attention.head_count_kv"] == [1, 2, 1, 2, 2]
    assert metadata["mimo2.attention.sliding_window_pattern"] == [0, 1, 0, 1, 1]
    assert metadata["mimo2.attention.sliding_window"] == 5
    assert metadata["tokenizer.ggml.model"] == "no_vocab"


def test_only_matrices_are_quantised(
    gguf: ModuleType, tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    """A router, norm or sink in 8 bits; or a matrix whose rows no block divides."""
    save_model(make_model(config), tmp_path / "hub", dtype="float32")
    convert_to_gguf(tmp_path / "hub", tmp_path / "m.gguf", dtype="q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert types["blk.1.attn_norm.weight"] == "F32"
    assert types["blk.1.attn_qkv.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "BF16"  # rows of 48


def test_a_tied_embedding_is_written_as_the_head_too(
    gguf: ModuleType, tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    save_gguf(make_model(config.replace(tie_embeddings=True)), tmp_path / "m.gguf", dtype="float32")
    tensors = read(gguf, tmp_path / "m.gguf")[1]
    assert np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_the_vocabulary_has_one_entry_per_row_of_the_embedding(
    gguf: ModuleType, tmp_path: Path, config: ModelConfig, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    """llama.cpp refuses a shorter list; a special token of the ordinary type would be found in plain text."""
    model = make_model(config.replace(vocab_size=300))
    save_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    metadata = read(gguf, tmp_path / "m.gguf")[0]
    pieces, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(pieces, list)
    assert isinstance(types, list)
    assert len(set(pieces)) == len(types) == 300
    end, think = tokenizer.special("<|im_end|>"), tokenizer.special("<think>")
    assert (pieces[end], types[end], types[think], types[299]) == ("<|im_end|>", 3, 4, 5)
    assert metadata["tokenizer.ggml.eos_token_id"] == end


def test_what_llama_cpp_would_compute_differently_is_refused(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    """A file that loads and gives other logits."""
    assert config.moe is not None
    scaled = config.replace(moe=dataclasses.replace(config.moe, routed_scaling=2.5))
    narrow = config.replace(global_attention=dataclasses.replace(config.global_attention, v_head_dim=4))
    for wrong, need in ((scaled, "routed_scaling=1"), (narrow, "head size")):
        with pytest.raises(ConfigError, match=need):
            save_gguf(make_model(wrong), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(CheckpointError, match="only 40"):
        save_gguf(make_model(config), tmp_path / "m.gguf", tokenizer=tokenizer)
    other = {
        **tokenizer.definition,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    }
    with pytest.raises(CheckpointError, match="another rule"):
        save_gguf(make_model(config), tmp_path / "m.gguf", tokenizer=Tokenizer(other))


def test_an_interrupted_export_leaves_the_old_file(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file under the final name, or scraps beside it."""
    save_model(make_model(config), tmp_path / "hub")
    (tmp_path / "m.gguf").write_bytes(b"old")

    def fail(self: CheckpointSource, tensor: HubTensor) -> torch.Tensor:
        raise OSError("no space left")

    monkeypatch.setattr(CheckpointSource, "read", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        convert_to_gguf(tmp_path / "hub", tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "m.gguf"}
