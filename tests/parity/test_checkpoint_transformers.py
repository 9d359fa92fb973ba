"""Checkpoints exchanged with transformers' own MiMo-V2-Flash, both ways."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openmimo.checkpoint.load import load_model
from openmimo.checkpoint.names import hub_tensors
from openmimo.checkpoint.save import save_model
from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig, MoEConfig
from openmimo.model.model import MiMoModel, build_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

GLOBAL, SLIDING = AttentionKind.GLOBAL, AttentionKind.SLIDING


def our_config(*, hidden: int = 32, dims: tuple[int, int] = (12, 8)) -> ModelConfig:
    def attention(kv_heads: int, theta: float, window: int | None) -> AttentionConfig:
        return AttentionConfig(
            num_heads=4,
            num_kv_heads=kv_heads,
            qk_head_dim=dims[0],
            v_head_dim=dims[1],
            rope_theta=theta,
            sink=window is not None,
            window_keys=window,
        )

    return ModelConfig(
        vocab_size=40,
        hidden_size=hidden,
        dense_dim=hidden,
        layer_kinds=(GLOBAL, SLIDING, GLOBAL),
        layer_is_moe=(False, True, True),
        global_attention=attention(1, 5e6, None),
        sliding_attention=attention(2, 1e4, 5),
        moe=MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=hidden // 2),
        num_mtp_heads=2,
    )


@pytest.fixture
def model() -> MiMoModel:
    return randomize(build_model(our_config()))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.3, generator=generator)
    return model


def in_memory(theirs: torch.nn.Module, ours: MiMoModel) -> dict[str, torch.Tensor]:
    """The tensors of a transformers model, cut apart as in the files and keyed by Hub name."""
    state, result = theirs.state_dict(), {}
    for tensor in hub_tensors(ours.config):
        if tensor.is_mtp:
            continue
        found = state.get(tensor.name)
        if found is None:
            assert tensor.alias is not None
            found = state[tensor.alias] if tensor.expert is None else state[tensor.alias][tensor.expert]
            found = found if tensor.rows is None else found[tensor.rows[0] : tensor.rows[1]]
        result[tensor.name] = found
    return result


def assert_same_tensors(theirs: torch.nn.Module, ours: MiMoModel) -> None:
    state = ours.state_dict()
    expected = in_memory(theirs, ours)
    for tensor in hub_tensors(ours.config):
        if not tensor.is_mtp:
            assert torch.equal(tensor.of(state[tensor.target]), expected[tensor.name]), tensor.name


def assert_same_logits(theirs: torch.nn.Module, ours: MiMoModel) -> None:
    ids = torch.randint(0, 40, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        difference = (theirs(ids).logits - ours(ids).logits).abs().max()
    assert float(difference) <= 1e-5


def from_pretrained(folder: Path, **options: object) -> torch.nn.Module:
    return transformers.MiMoV2FlashForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **options
    ).eval()


def test_our_native_checkpoint_loads_in_transformers(tmp_path: Path, model: MiMoModel) -> None:
    """Same tensors and same logits; our MTP heads are in the files and are ignored there."""
    save_model(model, tmp_path / "c", layout="native", dtype="float32", max_shard_bytes=20_000)
    theirs = from_pretrained(tmp_path / "c")
    assert_same_tensors(theirs, model)
    assert_same_logits(theirs, model)
    assert load_model(tmp_path / "c").config.num_mtp_heads == 2


@pytest.mark.parametrize("save_original_format", [True, False])
def test_transformers_checkpoint_loads_here(
    tmp_path: Path, model: MiMoModel, caplog: pytest.LogCaptureFixture, save_original_format: bool
) -> None:
    """Both of its spellings: separate experts and `attention_sink_bias`, or stacked experts and `sinks`."""
    save_model(model, tmp_path / "ours", layout="native", dtype="float32")
    theirs = randomize(from_pretrained(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=save_original_format)
    with caplog.at_level(logging.WARNING, logger="openmimo"):
        loaded = load_model(tmp_path / "theirs")
    assert loaded.config.num_mtp_heads == 0
    assert_same_tensors(theirs, loaded)
    assert_same_logits(theirs, loaded)


def test_native_fp8_is_dequantised_alike(tmp_path: Path) -> None:
    """Our plain blocks and scales mean to transformers what they mean to us, global K and V included.

    Its dequantisation step is called directly, because loading FP8 there needs another package.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model = randomize(build_model(our_config(hidden=256, dims=(384, 128))))
    save_model(model, tmp_path / "c", layout="native", dtype="fp8")
    stored = {}
    for path in (tmp_path / "c").glob("*.safetensors"):
        stored |= load_file(path)
    state = load_model(tmp_path / "c").state_dict()
    for tensor in hub_tensors(model.config):
        if tensor.fp8:
            weight, scale = stored[tensor.name], stored[f"{tensor.name}_scale_inv"]
            theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
            assert torch.equal(theirs, tensor.of(state[tensor.target])), tensor.name
