"""FP8 blocks against a slow twin, and the rank-wise grid of global K and V."""

import logging

import pytest
import torch
from torch import Tensor

from openmimo.checkpoint.fp8 import (
    FP8,
    Quantized,
    RankGrid,
    dequantize,
    dequantize_ranks,
    grid_support,
    log_grid_support,
    quantize,
    quantize_ranks,
    rank_grid,
)
from openmimo.config.model import AttentionConfig, preset
from openmimo.errors import CheckpointError, ShapeError

FLASH_GRID = RankGrid(num_ranks=4, qk_head_dim=192, v_head_dim=128)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of different size, so that a block boundary in the wrong place changes its scale.
    return torch.randn(shape, generator=generator) * torch.exp2(torch.randn((*shape[:-1], 1), generator=generator) * 2)


def slow_quantize(weight: Tensor) -> Quantized:
    """One block at a time, straight from the definition."""
    rows, columns = ((size + 127) // 128 for size in weight.shape)
    scale, bytes_ = torch.empty(rows, columns), torch.empty(weight.shape, dtype=FP8)
    for r in range(rows):
        for c in range(columns):
            block = weight[r * 128 : r * 128 + 128, c * 128 : c * 128 + 128]
            scale[r, c] = block.abs().max() / 448
            bytes_[r * 128 : r * 128 + 128, c * 128 : c * 128 + 128] = (block / scale[r, c]).to(FP8)
    return Quantized(bytes_, scale)


def equal(first: Quantized, second: Quantized) -> bool:
    return torch.equal(first.scale, second.scale) and torch.equal(
        first.weight.view(torch.uint8), second.weight.view(torch.uint8)
    )


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (1, 1), (130, 60), (64, 257), (300, 129)])
def test_plain_blocks_match_the_slow_twin_at_exact_and_partial_sizes(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    fast, slow = quantize(weight), slow_quantize(weight)
    assert equal(fast, slow)
    expanded = slow.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert torch.equal(dequantize(fast), slow.weight.float() * expanded)


def test_error_is_at_most_half_a_step_of_e4m3() -> None:
    """Normal numbers keep 4 significant bits: relative error at most 1/16; below 2**-6 the step is 2**-9."""
    weight = random(256, 256)
    quantized = quantize(weight)
    scale = quantized.scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = (dequantize(quantized) - weight).abs()
    assert bool((error <= torch.maximum(weight.abs() / 16, scale * 2**-10) * 1.0001).all())


def test_zero_and_vanishing_blocks_stay_finite() -> None:
    weight = torch.zeros(128, 256)
    weight[3, 130] = 1e-44
    quantized = quantize(weight)
    assert quantized.scale[0, 0] == 1.0
    assert bool(dequantize(quantized).isfinite().all())
    assert torch.equal(dequantize(quantized)[:, :128], weight[:, :128])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_fp8_cannot_hold_are_refused(bad: float) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        quantize(torch.tensor([[1.0, bad]]))


def test_unusable_scales_are_refused() -> None:
    weight = torch.ones(2, 2).to(FP8)
    for scale in (float("nan"), -1.0):
        with pytest.raises(CheckpointError, match="scales"):
            dequantize(Quantized(weight, torch.tensor([[scale]])))
    with pytest.raises(ShapeError):
        dequantize(Quantized(weight, torch.ones(1, 1, dtype=torch.float64)))


def test_rank_grid_has_the_published_scale_rows() -> None:
    """K 0..127 -> Ks[2h], K 128..191 and V 0..63 -> Ks[2h + 1], V 64..127 -> Vs[h]; scales [8, 32] and [4, 32]."""
    grid = rank_grid(preset("flash").global_attention)
    assert grid == FLASH_GRID
    k_rows, v_rows = grid.block_of_rows()
    k_per_head, v_per_head = k_rows.view(4, 192), v_rows.view(4, 128)
    for head in range(4):
        assert set(k_per_head[head, :128].tolist()) == {2 * head}
        assert set(k_per_head[head, 128:].tolist()) == set(v_per_head[head, :64].tolist()) == {2 * head + 1}
        assert set(v_per_head[head, 64:].tolist()) == {8 + head}


def test_rank_grid_equals_quantising_whole_ranks_and_slicing() -> None:
    """The rule itself: quantise [16 Q heads | K | V] of a rank, store its 27 scale rows as 24 + 2 + 1."""
    q, k, v = random(4, 3072, 160), random(4, 192, 160, seed=1), random(4, 128, 160, seed=2)
    fast_k, fast_v = quantize_ranks(k.flatten(0, 1), v.flatten(0, 1), FLASH_GRID)
    ranks = [slow_quantize(torch.cat((q[r], k[r], v[r]))) for r in range(4)]
    assert all(rank.scale.shape == (27, 2) for rank in ranks)
    slow_k = Quantized(torch.cat([r.weight[3072:3264] for r in ranks]), torch.cat([r.scale[24:26] for r in ranks]))
    slow_v = Quantized(torch.cat([r.weight[3264:] for r in ranks]), torch.cat([r.scale[26:] for r in ranks]))
    assert equal(fast_k, slow_k)
    assert equal(fast_v, slow_v)
    whole = torch.stack([dequantize(rank) for rank in ranks])
    got_k, got_v = dequantize_ranks(fast_k, fast_v, FLASH_GRID)
    assert torch.equal(got_k.view(4, 192, 160), whole[:, 3072:3264])
    assert torch.equal(got_v.view(4, 128, 160), whole[:, 3264:])


def test_grids_that_scale_rows_cannot_express_fall_back_to_plain_blocks() -> None:
    def attention(heads: int, kv: int, k: int, v: int) -> AttentionConfig:
        return AttentionConfig(
            num_heads=heads, num_kv_heads=kv, qk_head_dim=k, v_head_dim=v, rope_theta=1e4, sink=False
        )

    assert rank_grid(attention(8, 2, 48, 32)) is None  # the Q rows of a rank end inside a block
    assert rank_grid(attention(4, 2, 192, 64)) is None  # two blocks of [K | V], but 2 + 1 scale rows
    assert rank_grid(attention(4, 2, 192, 128)) is not None


def test_self_check_names_the_grid_that_made_the_bytes(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a reader that takes the wrong grid: it must warn."""
    k, v = random(768, 160), random(512, 160, seed=1)
    rank_k, rank_v = (part.weight for part in quantize_ranks(k, v, FLASH_GRID))
    plain_k, plain_v = quantize(k).weight, quantize(v).weight
    rank_share, other = grid_support(rank_k, rank_v, FLASH_GRID)
    assert rank_share == 1.0
    assert other < 0.9
    other, plain_share = grid_support(plain_k, plain_v, FLASH_GRID)
    assert plain_share == 1.0
    assert other < 0.9
    with caplog.at_level(logging.INFO, logger="openmimo"):
        log_grid_support("k", rank_k, rank_v, FLASH_GRID, rank_wise=True)
        log_grid_support("k", plain_k, plain_v, FLASH_GRID, rank_wise=True)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
