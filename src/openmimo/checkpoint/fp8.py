"""E4M3 weights with one fp32 scale per 128 x 128 block, and the rank-wise grid of global K and V.

A scale is the block's largest magnitude / 448 and is multiplied back: weight = e4m3 * scale.

The published checkpoint was quantised as tensor-parallel ranks, one per global KV head, each a matrix with the rows
[its Q heads | K | V]. With K = 192 and V = 128 a block of that matrix covers the last 64 rows of K and the first 64
rows of V, so both share the scale that is stored with K.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from openmimo.config.model import AttentionConfig
from openmimo.errors import CheckpointError, ShapeError

BLOCK = 128
FP8 = torch.float8_e4m3fn
_MAX = 448.0
_MAX_CODE = 0x7E  # 448 without its sign bit
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantized:
    """E4M3 weight and the fp32 scales of its blocks."""

    weight: Tensor
    scale: Tensor


@dataclass(frozen=True)
class RowScaled:
    """E4M3 weight (R, D) and, whatever its grid was, the fp32 scale of each row's 128 columns (R, C)."""

    weight: Tensor
    scale_RC: Tensor

    def dequantize(self) -> Tensor:
        """The fp32 matrix."""
        return _times_blocks(self.weight.float(), self.scale_RC, divide=False)


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Scale rows of global K and V when each rank's K and V were quantised as one matrix.

    Shapes: K scale (num_ranks * k_blocks, C), V scale (num_ranks * v_blocks, C) with C = ceil(hidden / 128).
    """

    num_ranks: int
    qk_head_dim: int
    v_head_dim: int

    @property
    def k_blocks(self) -> int:
        return num_blocks(self.qk_head_dim)

    @property
    def v_blocks(self) -> int:
        return num_blocks(self.v_head_dim)

    def block_of_rows(self) -> tuple[Tensor, Tensor]:
        """For each row of K and of V its row in [K scales; V scales]."""
        ranks = torch.arange(self.num_ranks)[:, None]
        blocks = torch.arange(self.qk_head_dim + self.v_head_dim) // BLOCK
        with_k = ranks * self.k_blocks + blocks
        with_v = self.num_ranks * self.k_blocks + ranks * self.v_blocks + blocks - self.k_blocks
        table = torch.where(blocks < self.k_blocks, with_k, with_v)
        return table[:, : self.qk_head_dim].flatten(), table[:, self.qk_head_dim :].flatten()


def rank_grid(attention: AttentionConfig) -> RankGrid | None:
    """The rank-wise grid of a global layer, or None where plain blocks are used.

    Q is stored with plain blocks, so a rank's Q rows must fill whole blocks. The blocks of [K | V] are stored as
    ceil(K / 128) rows with K and ceil(V / 128) with V; that must be their number (V = 64 beside K = 192 has one too
    few). Both hold for the published shapes; everything else is written and read with plain blocks.
    """
    k, v, ranks = attention.qk_head_dim, attention.v_head_dim, attention.num_kv_heads
    if attention.num_heads // ranks * k % BLOCK or num_blocks(k + v) != num_blocks(k) + num_blocks(v):
        return None
    return RankGrid(num_ranks=ranks, qk_head_dim=k, v_head_dim=v)


def num_blocks(size: int) -> int:
    """How many blocks cover `size` rows or columns; the last may be partial."""
    return -(-size // BLOCK)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The scale shape of a plain grid over a matrix."""
    return num_blocks(shape[0]), num_blocks(shape[1])


def quantize(weight: Tensor) -> Quantized:
    """Quantise a matrix with plain 128 x 128 blocks. Raises: CheckpointError when it holds NaN or infinity."""
    rows = torch.arange(weight.shape[0]) // BLOCK
    scale = _block_scales(weight, rows, num_blocks(weight.shape[0]))
    return Quantized(_encode(weight, scale[rows]), scale)


def row_scaled(quantized: Quantized) -> RowScaled:
    """A plain grid's scales, row by row. Raises: CheckpointError on scales that cannot be scales."""
    rows = torch.arange(quantized.weight.shape[0]) // BLOCK
    return RowScaled(quantized.weight, _checked(quantized.scale)[rows])


def dequantize(quantized: Quantized) -> Tensor:
    """The fp32 matrix of a plain grid. Raises: CheckpointError on scales that cannot be scales."""
    return row_scaled(quantized).dequantize()


def quantize_ranks(k: Tensor, v: Tensor, grid: RankGrid) -> tuple[Quantized, Quantized]:
    """Quantise K and V of a global layer with the rank-wise grid."""
    k_rows, v_rows = grid.block_of_rows()
    num_k = grid.num_ranks * grid.k_blocks
    table = _block_scales(torch.cat((k, v)), torch.cat((k_rows, v_rows)), num_k + grid.num_ranks * grid.v_blocks)
    return Quantized(_encode(k, table[k_rows]), table[:num_k]), Quantized(_encode(v, table[v_rows]), table[num_k:])


def row_scaled_ranks(k: Quantized, v: Quantized, grid: RankGrid) -> tuple[RowScaled, RowScaled]:
    """K and V of `quantize_ranks` with their scales row by row; V needs the scales of K too."""
    k_rows, v_rows = grid.block_of_rows()
    table = _checked(torch.cat((k.scale, v.scale)))
    return RowScaled(k.weight, table[k_rows]), RowScaled(v.weight, table[v_rows])


def dequantize_ranks(k: Quantized, v: Quantized, grid: RankGrid) -> tuple[Tensor, Tensor]:
    """The fp32 K and V of `quantize_ranks`."""
    own, other = row_scaled_ranks(k, v, grid)
    return own.dequantize(), other.dequantize()


def grid_support(k_weight: Tensor, v_weight: Tensor, grid: RankGrid) -> tuple[float, float]:
    """How well E4M3 bytes fit the rank-wise and the plain grid: the share of blocks that reach 448 in each.

    A block's largest magnitude becomes exactly 448, so the grid that was used has a share of 1.
    Shapes: k_weight (num_ranks * K, D), v_weight (num_ranks * V, D).
    """
    codes = torch.cat((k_weight, v_weight)).view(torch.uint8) & 0x7F
    rank_rows = torch.cat(grid.block_of_rows())
    plain_k = torch.arange(k_weight.shape[0]) // BLOCK
    plain_v = torch.arange(v_weight.shape[0]) // BLOCK + num_blocks(k_weight.shape[0])
    return _full_share(codes, rank_rows), _full_share(codes, torch.cat((plain_k, plain_v)))


def log_grid_support(name: str, k_weight: Tensor, v_weight: Tensor, grid: RankGrid, *, rank_wise: bool) -> None:
    """Log which grid the bytes of a global layer support; a warning when it is not the one in use."""
    rank_share, plain_share = grid_support(k_weight, v_weight, grid)
    used, other = (rank_share, plain_share) if rank_wise else (plain_share, rank_share)
    level = logging.INFO if used >= other else logging.WARNING
    shares = f"{rank_share:.1%} of blocks full under the rank-wise grid, {plain_share:.1%} under the plain one"
    _log.log(level, "%s: %s; reading it with the %s grid", name, shares, "rank-wise" if rank_wise else "plain")


def _full_share(codes: Tensor, rows: Tensor) -> float:
    largest = _block_maxima(codes.to(torch.float32), rows, int(rows.max()) + 1)
    return float((largest == _MAX_CODE).float().mean())


def _block_maxima(magnitudes: Tensor, rows: Tensor, count: int) -> Tensor:
    """Largest entry per (row block, 128 columns). Shapes: (R, C), (R,) -> (count, ceil(C / 128))."""
    columns = magnitudes.shape[1]
    full = columns - columns % BLOCK
    parts = [magnitudes[:, :full].unflatten(1, (-1, BLOCK)).amax(-1)] if full else []
    if full < columns:
        parts.append(magnitudes[:, full:].amax(-1, keepdim=True))
    by_row = torch.cat(parts, dim=1)
    return by_row.new_zeros(count, by_row.shape[1]).scatter_reduce_(0, rows[:, None].expand_as(by_row), by_row, "amax")


def _block_scales(weight: Tensor, rows: Tensor, count: int) -> Tensor:
    largest = _block_maxima(weight.float().abs(), rows, count)
    if not bool(largest.isfinite().all()):
        raise CheckpointError("a weight holds NaN or infinity and cannot become FP8; save it as float32 and repair it")
    # Zero blocks get scale 1; near-zero ones a normal number, so that the division stays finite.
    return torch.where(largest > 0, (largest / _MAX).clamp_min(_SMALLEST_SCALE), 1.0)


def _encode(weight: Tensor, row_scales: Tensor) -> Tensor:
    scaled = _times_blocks(weight.float().clone(), row_scales, divide=True)
    return scaled.clamp_(-_MAX, _MAX).to(FP8)


def _times_blocks(values: Tensor, row_scales: Tensor, *, divide: bool) -> Tensor:
    """Multiply or divide in place: row r, column c by `row_scales[r, c // 128]`."""
    full = values.shape[1] - values.shape[1] % BLOCK
    whole, edge = values[:, :full].unflatten(1, (-1, BLOCK)) if full else None, values[:, full:]
    for part, scales in ((whole, row_scales[:, : full // BLOCK, None]), (edge, row_scales[:, full // BLOCK :])):
        if part is not None and part.numel():
            part.div_(scales) if divide else part.mul_(scales)
    return values


def _checked(scale: Tensor) -> Tensor:
    if scale.dtype != torch.float32 or scale.ndim != 2:
        raise ShapeError(f"FP8 scales must be a float32 matrix, got {scale.dtype} of shape {tuple(scale.shape)}")
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CheckpointError("FP8 scales hold negative or non-finite numbers; copy the checkpoint again")
    return scale
