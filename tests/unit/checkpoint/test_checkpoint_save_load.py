"""Saving, loading and converting whole checkpoints."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from openmimo.checkpoint.convert import convert
from openmimo.checkpoint.fp8 import dequantize, dequantize_ranks, quantize, quantize_ranks, rank_grid
from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.names import hub_tensors, pair_of
from openmimo.checkpoint.save import save_model
from openmimo.config.model import ModelConfig
from openmimo.config.tensor_names import INDEX_NAME
from openmimo.errors import CheckpointError
from openmimo.model.model import MiMoModel

MakeModel = Callable[[ModelConfig], MiMoModel]
LAYOUTS, DTYPES = ("hub", "native"), ("float32", "bfloat16", "fp8")


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read with the safetensors library, so that our writer is judged by another reader."""
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            result |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return result


def assert_same(first: MiMoModel, second: MiMoModel) -> None:
    expected, got = first.state_dict(), second.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_round_trip_is_bit_exact(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, layout: str
) -> None:
    model = make_model(config)
    save_model(model, tmp_path / "c", layout=layout, dtype="float32")
    loaded = load_model(tmp_path / "c", verify=True)
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_bfloat16_rounds_weights_once_and_never_the_router(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    model = make_model(config)
    save_model(model, tmp_path / "c")
    for name, tensor in load_model(tmp_path / "c", "bfloat16").state_dict().items():
        router = ".mlp.gate." in name
        expected = model.state_dict()[name]
        assert tensor.dtype == (torch.float32 if router else torch.bfloat16), name
        assert torch.equal(tensor, expected if router else expected.to(torch.bfloat16)), name


@pytest.mark.parametrize("max_shard_bytes", [1, 20_000, 1 << 30])
def test_any_shard_size_gives_the_same_model_and_a_true_index(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, max_shard_bytes: int
) -> None:
    model = make_model(config)
    save_model(model, tmp_path / "c", dtype="float32", max_shard_bytes=max_shard_bytes)
    assert_same(model, load_model(tmp_path / "c"))
    index = json.loads((tmp_path / "c" / INDEX_NAME).read_text())
    tensors = stored_tensors(tmp_path / "c")
    assert index["weight_map"].keys() == tensors.keys() == {tensor.name for tensor in hub_tensors(config)}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    mtp = {file for name, file in index["weight_map"].items() if ".mtp." in name}
    assert mtp == {"model_mtp.safetensors"}
    main = {file for file in index["weight_map"].values() if file not in mtp}
    assert len(main) == {1: sum(".mtp." not in n for n in tensors), 1 << 30: 1}.get(max_shard_bytes, len(main))
    assert main == {f"model-{i:05d}-of-{len(main):05d}.safetensors" for i in range(1, len(main) + 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["config", "rank_config", "one_rank_config"])
def test_fp8_values_survive_writing_and_reading_exactly(
    tmp_path: Path, request: pytest.FixtureRequest, make_model: MakeModel, layout: str, which: str
) -> None:
    """What loads is the dequantised value, and what is not to be quantised is plain bfloat16 or float32."""
    config = request.getfixturevalue(which)
    model = make_model(config)
    save_model(model, tmp_path / "c", layout=layout, dtype="fp8")
    stored, loaded = stored_tensors(tmp_path / "c"), load_model(tmp_path / "c").state_dict()
    state = model.state_dict()
    grid = rank_grid(config.global_attention) if layout == "hub" else None
    for tensor in hub_tensors(config):
        original, got = tensor.of(state[tensor.target]), tensor.of(loaded[tensor.target])
        quantised = f"{tensor.name}_scale_inv" in stored
        assert quantised == any(f".{part}_proj." in tensor.name for part in ("q", "k", "v", "gate", "up", "down"))
        if quantised and tensor.pair and grid:
            other = pair_of(config, tensor)
            k, v = (part.of(state[part.target]) for part in ((tensor, other) if tensor.is_key else (other, tensor)))
            expected = dequantize_ranks(*quantize_ranks(k, v, grid), grid)[0 if tensor.is_key else 1]
        elif quantised:
            expected = dequantize(quantize(original))
        else:
            expected = original if ".mlp.gate." in tensor.name else original.bfloat16().float()
        assert torch.equal(got, expected), tensor.name


@pytest.mark.parametrize("source_layout", LAYOUTS)
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_equals_saving_directly(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, source_layout: str, source_dtype: str, layout: str,
    dtype: str,
) -> None:  # fmt: skip
    """All 36 pairs: converting a folder is the same as loading it and saving that; FP8 to FP8 keeps every byte."""
    save_model(make_model(config), tmp_path / "a", layout=source_layout, dtype=source_dtype)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b", layout=layout, dtype=dtype, max_shard_bytes=30_000)
    got = stored_tensors(tmp_path / "b")
    if source_dtype == dtype:
        expected = stored_tensors(tmp_path / "a")
    else:
        save_model(load_model(tmp_path / "a"), tmp_path / "c", layout=layout, dtype=dtype)
        expected = stored_tensors(tmp_path / "c")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    load_model(tmp_path / "b", verify=True)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"


def test_fp8_moves_between_the_two_grids_by_way_of_float32(
    tmp_path: Path, rank_config: ModelConfig, make_model: MakeModel
) -> None:
    """Bytes of global K and V may change with the grid; everything else passes through."""
    save_model(make_model(rank_config), tmp_path / "hub", dtype="fp8")
    convert(tmp_path / "hub", tmp_path / "native", layout="native", dtype="fp8")
    convert(tmp_path / "hub", tmp_path / "again", layout="hub", dtype="fp8")
    hub, native, again = (stored_tensors(tmp_path / name) for name in ("hub", "native", "again"))
    assert all(torch.equal(again[name].view(torch.uint8), hub[name].view(torch.uint8)) for name in hub)
    changed = {name for name in hub if hub[name].shape != native[name].shape}
    assert changed == {f"model.layers.{layer}.self_attn.k_proj.weight_scale_inv" for layer in (0, 2)}
    before, after = load_model(tmp_path / "hub").state_dict(), load_model(tmp_path / "native").state_dict()
    for name, tensor in before.items():
        if name in ("layers.0.self_attn.qkv_proj.weight", "layers.2.self_attn.qkv_proj.weight"):
            assert float((tensor - after[name]).abs().max()) < 0.1
        else:
            assert torch.equal(tensor, after[name]), name


def test_weight_and_scale_may_sit_in_different_files(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    save_model(make_model(config), tmp_path / "one", dtype="fp8")
    save_model(make_model(config), tmp_path / "many", dtype="fp8", max_shard_bytes=1)
    assert_same(load_model(tmp_path / "one"), load_model(tmp_path / "many"))


def test_a_folder_with_one_file_and_no_index_loads(tmp_path: Path, config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config.replace(num_mtp_heads=0))
    save_model(model, tmp_path / "c", dtype="float32")
    (tmp_path / "c" / INDEX_NAME).unlink()
    (tmp_path / "c" / "model-00001-of-00001.safetensors").rename(tmp_path / "c" / "model.safetensors")
    assert_same(model, load_model(tmp_path / "c"))


def test_absent_mtp_heads_are_dropped_with_a_warning_and_partial_ones_refused(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(config)
    save_model(model, tmp_path / "c", dtype="float32", max_shard_bytes=1)
    index_path = tmp_path / "c" / INDEX_NAME
    index = json.loads(index_path.read_text())
    everything = dict(index["weight_map"])
    index["weight_map"] = {name: file for name, file in everything.items() if ".mtp." not in name}
    index_path.write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING, logger="openmimo"):
        loaded = load_model(tmp_path / "c")
    assert loaded.config.num_mtp_heads == 0
    assert "no MTP heads" in caplog.text
    (tmp_path / "c" / "model_mtp.safetensors").unlink()
    convert(tmp_path / "c", tmp_path / "d", dtype="float32")
    save_model(make_model(config.replace(num_mtp_heads=1)), tmp_path / "one", dtype="float32")
    (tmp_path / "one" / "config.json").write_bytes((tmp_path / "c" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"missing: 14\n  model.mtp.layers.1"):
        load_model(tmp_path / "one")


def test_tied_embeddings_share_memory_after_loading(tmp_path: Path, config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config.replace(tie_embeddings=True))
    save_model(model, tmp_path / "c", dtype="float32")
    loaded = load_model(tmp_path / "c")
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.embed_tokens.weight)


def test_report_lists_missing_unexpected_and_wrong_tensors_with_the_nearest_name(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    save_model(make_model(config), tmp_path / "c", dtype="float32")
    for path in (tmp_path / "c").glob("*.safetensors"):
        path.write_bytes(
            path.read_bytes().replace(b"model.layers.0.self_attn.o_proj", b"model.layers.0.self_attn.O_proj")
        )
    index = tmp_path / "c" / INDEX_NAME
    index.write_text(index.read_text().replace("model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.O_proj"))
    hub = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(hub | {"vocab_size": 41}))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "c")
    text = str(caught.value)
    assert "o_proj.weight (did you mean 'model.layers.0.self_attn.O_proj.weight'?)" in text
    assert "unexpected: 1" in text
    assert "model.embed_tokens.weight: shape [40, 32], expected [41, 32]" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocab_size", 2 * 10**9), ("hidden_size", 10**9), ("n_routed_experts", 10**9), ("intermediate_size", 2 * 10**9)],
)
def test_a_lying_config_allocates_nothing(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel, key: str, value: int
) -> None:
    """Without the check before allocation each of these asks for terabytes."""
    save_model(make_model(config), tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(tmp_path / "c")


def test_unknown_choices_name_the_nearest(tmp_path: Path, config: ModelConfig, make_model: MakeModel) -> None:
    model = make_model(config)
    with pytest.raises(CheckpointError, match="did you mean 'native'"):
        save_model(model, tmp_path / "c", layout="natve")
    with pytest.raises(CheckpointError, match="did you mean 'bfloat16'"):
        save_model(model, tmp_path / "c", dtype="bfloat")
    save_model(model, tmp_path / "c")
    with pytest.raises(CheckpointError, match="did you mean 'float32'"):
        load_model(tmp_path / "c", "float3")
    with pytest.raises(CheckpointError, match="choose another target"):
        convert(tmp_path / "c", tmp_path / "c")


def test_nan_weights_leave_the_old_checkpoint_in_place(
    tmp_path: Path, config: ModelConfig, make_model: MakeModel
) -> None:
    model = make_model(config)
    save_model(model, tmp_path / "c", dtype="fp8")
    with torch.no_grad():
        model.layers[2].mlp.experts.down_proj[1, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        save_model(model, tmp_path / "c", dtype="fp8")
    load_model(tmp_path / "c", verify=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_extra_files_are_written_and_listed(tmp_path: Path, config: ModelConfig, make_model: MakeModel) -> None:
    (tmp_path / "merges").write_text("a b")
    extra = {"merges.txt": tmp_path / "merges", "note.txt": b"hello"}
    save_model(make_model(config), tmp_path / "c", extra_files=extra)
    assert (tmp_path / "c" / "merges.txt").read_text() == "a b"
    (tmp_path / "c" / "note.txt").write_bytes(b"hullo")
    with pytest.raises(CheckpointError, match=r"note.txt.*SHA-256"):
        load_model(tmp_path / "c", verify=True)
