"""Hybrid attention: global layers see every earlier key, sliding layers the last `window_keys`.

Suffixes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, K QK dim, V value dim,
C tokens per block of the windowed form, N number of blocks, L keys that one block can see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig
from openmimo.errors import ShapeError
from openmimo.kernels import training as kernels
from openmimo.model.cache import Cache, LayerCache
from openmimo.model.linear import Linear
from openmimo.model.masks import (
    SINK_COLUMNS,
    additive_mask,
    branch_biases,
    causal_biases,
    visible_keys,
    window_bias,
    with_sink_columns,
)
from openmimo.model.ordered import PackedDocuments, order_keys
from openmimo.model.rope import rotary_tables, rotate

# Scores computed at once, in elements.
SLICE_SCORES = 1 << 23


@dataclass(frozen=True)
class AttentionPlan:
    """What all layers of one kind share in a forward pass: rotary tables and additive masks.

    `bias` is None when plain causal masking is enough. For sliding layers it has one (C x L) tile per block, for
    cached decoding one row per query. Global layers on packed rows have `row_biases` instead, one per block of queries,
    and so have all layers where documents branch.
    With `first_key_BT`, the first key that each query sees, the fused kernel runs and there are no masks at all;
    `hole_BT2` are keys after it, from begin to before end, that belong to other branches.
    With `attend`, (q_BTHK, k_BSGK, v_BSGV, sink_H) -> (B, T, H, V), that takes the place of all forms here: callers
    that keep the keys themselves bring one, and so do invariant passes (`ordered`).
    `static` asks for forms whose shapes and control flow do not depend on values, as CUDA graphs need.
    """

    kind: AttentionKind
    cos_BT1R: Tensor
    sin_BT1R: Tensor
    bias: Tensor | None
    row_biases: tuple[Tensor, ...] = ()
    block_tokens: int = 0
    cached: bool = False
    first_key_BT: Tensor | None = None
    hole_BT2: Tensor | None = None
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None
    static: bool = False


class Attention(nn.Module):
    """Grouped-query attention with partial rotary, value scale and an optional sink per head.

    Source: MiMo-V2-Flash report, hybrid attention. The sink enters the softmax denominator only.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.kind = kind
        self.geometry: AttentionConfig = config.attention(kind)
        self.value_scale = config.value_scale
        g = self.geometry
        self.split_sizes = (g.num_heads * g.qk_head_dim, g.num_kv_heads * g.qk_head_dim, g.num_kv_heads * g.v_head_dim)
        self.qkv_proj = Linear(config.hidden_size, sum(self.split_sizes))
        self.o_proj = Linear(g.num_heads * g.v_head_dim, config.hidden_size)
        self.attention_sink_bias = nn.Parameter(torch.zeros(g.num_heads)) if g.sink else None

    def forward(self, x_BTD: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """Shapes: x (B, T, D) -> (B, T, D). With a cache, new keys are written to its slots first."""
        if plan.first_key_BT is not None:
            return self.o_proj(self._fused(self.qkv_proj(x_BTD), plan, plan.first_key_BT).flatten(-2))
        g = self.geometry
        q, k, v = self.qkv_proj(x_BTD).split(self.split_sizes, dim=-1)
        q_BTHK = rotate(q.unflatten(-1, (g.num_heads, g.qk_head_dim)), plan.cos_BT1R, plan.sin_BT1R)
        k_BTGK = rotate(k.unflatten(-1, (g.num_kv_heads, g.qk_head_dim)), plan.cos_BT1R, plan.sin_BT1R)
        v_BTGV = v.unflatten(-1, (g.num_kv_heads, g.v_head_dim)) * self.value_scale
        if cache is not None:
            cache.write(k_BTGK, v_BTGV)
        if plan.cached:
            assert cache is not None
            k_BTGK, v_BTGV = cache.read()
        if plan.attend is not None:
            out_BTHV = plan.attend(q_BTHK, k_BTGK, v_BTGV, self.attention_sink_bias)
        elif plan.row_biases:
            out_BTHV = attend_row_blocks(
                q_BTHK, k_BTGK, v_BTGV, biases=plan.row_biases, sink_H=self.attention_sink_bias
            )
        elif plan.cached or self.kind is AttentionKind.GLOBAL:
            out_BTHV = attend(q_BTHK, k_BTGK, v_BTGV, bias=plan.bias, sink_H=self.attention_sink_bias)
        else:
            assert plan.bias is not None
            out_BTHV = attend_window(
                q_BTHK,
                k_BTGK,
                v_BTGV,
                bias_NCL=plan.bias,
                block_tokens=plan.block_tokens,
                sink_H=self.attention_sink_bias,
            )
        return self.o_proj(out_BTHV.flatten(-2))

    def _fused(self, qkv_BTW: Tensor, plan: AttentionPlan, first_key_BT: Tensor) -> Tensor:
        """The same in one kernel, from the joint projection on. Shapes: -> (B, T, H, V)."""
        g = self.geometry
        cos_BTR, sin_BTR = plan.cos_BT1R.squeeze(2), plan.sin_BT1R.squeeze(2)
        shape = kernels.AttentionShape(g.num_heads, g.num_kv_heads, g.qk_head_dim, g.v_head_dim, cos_BTR.shape[-1])
        sink_H = self.attention_sink_bias
        return kernels.attention(
            qkv_BTW,
            cos_BTR,
            sin_BTR,
            first_key_BT,
            sink_H,
            shape=shape,
            value_scale=self.value_scale,
            hole_BT2=plan.hole_BT2,
        )


def attend(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *, bias: Tensor | None, sink_H: Tensor | None) -> Tensor:
    """Attention of every query to all keys that `bias` allows; causal when `bias` is None.

    Shapes: bias (B or 1, T, S, plus the sink's columns) additive -> out (B, T, H, V).
    Raises: ShapeError if G does not divide H.
    """
    groups = _heads_per_group(q_BTHK, k_BSGK)
    k_BGSK, v_BGSV = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
    if bias is None and sink_H is None:
        return _fused_causal(q_BTHK.transpose(1, 2), k_BGSK, v_BGSV, groups).transpose(1, 2)
    if bias is None:
        one_document_1T = torch.zeros(1, q_BTHK.shape[1], dtype=torch.int32, device=q_BTHK.device)
        biases = causal_biases(one_document_1T, q_BTHK.dtype, sink=True)
        return attend_row_blocks(q_BTHK, k_BSGK, v_BSGV, biases=biases, sink_H=sink_H)
    out_BGRTV = masked_softmax_attention(_stack_groups(q_BTHK, groups), k_BGSK, v_BGSV, bias, sink_H)
    return out_BGRTV.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def attend_row_blocks(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, biases: tuple[Tensor, ...], sink_H: Tensor | None
) -> Tensor:
    """Causal attention in blocks of queries (see `causal_biases`): no product with keys behind a block's end.

    Shapes: -> out (B, T, H, V).   Cost: half of the full square's FLOPs as T grows.
    """
    outputs: list[Tensor] = []
    start = 0
    for bias_BCS in biases:
        end = start + bias_BCS.shape[1]
        keys, values = k_BTGK[:, :end], v_BTGV[:, :end]
        outputs.append(attend(q_BTHK[:, start:end], keys, values, bias=bias_BCS, sink_H=sink_H))
        start = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def attend_window(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, *, bias_NCL: Tensor, block_tokens: int, sink_H: Tensor | None
) -> Tensor:
    """Sliding-window attention in blocks: each block of C queries sees its own and the blocks just before.

    The batch is laid end to end as one long sequence; `bias_NCL` (see `window_bias`) keeps sequences,
    documents and the window apart, so no T x T mask exists.
    Shapes: -> out (B, T, H, V).   Cost: 2*B*T*H*(K+V)*L FLOPs and O(B*T*L) memory, L = window + C at most.
    """
    batch, num_tokens, num_heads, _ = q_BTHK.shape
    groups = _heads_per_group(q_BTHK, k_BTGK)
    num_blocks = bias_NCL.shape[0]
    keys_per_block = bias_NCL.shape[2] - (SINK_COLUMNS if sink_H is not None else 0)
    num_back = keys_per_block // block_tokens - 1
    tail = num_blocks * block_tokens - batch * num_tokens

    def blocks(x_BTHK: Tensor, front: int) -> Tensor:
        flat = x_BTHK.flatten(0, 1)
        if front or tail:
            flat = F.pad(flat, (0, 0, 0, 0, front * block_tokens, tail))
        return flat.unflatten(0, (num_blocks + front, block_tokens))

    def neighbours(x_BTGK: Tensor) -> Tensor:
        padded = blocks(x_BTGK, num_back).transpose(1, 2)
        parts = [padded[i : i + num_blocks] for i in range(num_back + 1)]
        if sink_H is not None:
            parts.append(
                padded.new_zeros(1, 1, 1, 1).expand(num_blocks, padded.shape[1], SINK_COLUMNS, padded.shape[3])
            )
        return torch.cat(parts, dim=2)  # (N, G, L, K)

    out_NGRCV = masked_softmax_attention(
        _stack_groups(blocks(q_BTHK, 0), groups), neighbours(k_BTGK), neighbours(v_BTGV), bias_NCL, sink_H
    )
    out_NCHV = out_NGRCV.unflatten(2, (groups, block_tokens)).permute(0, 3, 1, 2, 4)
    return out_NCHV.reshape(num_blocks * block_tokens, num_heads, -1)[: batch * num_tokens].unflatten(
        0, (batch, num_tokens)
    )


def masked_softmax_attention(
    q_NGMK: Tensor, k_NGLK: Tensor, v_NGLV: Tensor, bias_NTL: Tensor, sink_H: Tensor | None
) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v, with M = R * T stacked query rows per key/value head.

    The sink is one more key: its k and v are zero, its score is the learned scalar, so it adds exp(b) to the
    denominator and nothing else. The softmax kernels accumulate in fp32 whatever the score dtype is.
    Large batches run in slices so that the scores of one slice stay near the caches.
    """
    groups, rows = q_NGMK.shape[1:3]
    missing = bias_NTL.shape[2] - k_NGLK.shape[2]
    if missing:
        k_NGLK, v_NGLV = (F.pad(x, (0, 0, 0, missing)) for x in (k_NGLK, v_NGLV))
    step = max(1, SLICE_SCORES // (groups * rows * bias_NTL.shape[-1]))
    outputs: list[Tensor] = []
    for start in range(0, q_NGMK.shape[0], step):
        rows_n = slice(start, start + step)
        bias_nTL = bias_NTL if bias_NTL.shape[0] == 1 else bias_NTL[rows_n]
        outputs.append(_MaskedSoftmaxAttention.apply(q_NGMK[rows_n], k_NGLK[rows_n], v_NGLV[rows_n], bias_nTL, sink_H))  # type: ignore[arg-type]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _MaskedSoftmaxAttention(torch.autograd.Function):
    """Written out because the scores are by far the largest tensors of a layer: each pass over them counts.

    Forward reads them four times, backward five; autograd's own form takes twice as many.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NGMK: Tensor, k_NGLK: Tensor, v_NGLV: Tensor, bias_NTL: Tensor, sink_H: Tensor | None
    ) -> Tensor:
        batch, groups, rows, dim = q_NGMK.shape
        num_rows, num_keys = bias_NTL.shape[1:]
        per_group = rows // num_rows
        bias = bias_NTL[:, None, None].expand(batch, groups, per_group, num_rows, num_keys)
        scores_NGRTL = bias.clone(memory_format=torch.contiguous_format)
        if sink_H is not None:
            scores_NGRTL[..., num_keys - SINK_COLUMNS] = sink_H.view(groups, per_group, 1)
        scores = scores_NGRTL.view(batch * groups, rows, num_keys)
        q, k, v = (x.reshape(batch * groups, -1, x.shape[-1]) for x in (q_NGMK, k_NGLK, v_NGLV))
        probabilities = scores.baddbmm_(q, k.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
        ctx.save_for_backward(q_NGMK, k_NGLK, v_NGLV, probabilities)
        ctx.sink = None if sink_H is None else (sink_H.shape[0], sink_H.dtype)
        ctx.num_rows = num_rows
        return torch.bmm(probabilities, v).view(batch, groups, rows, -1)

    @staticmethod
    def backward(ctx: Any, grad_NGMV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_NGMK, k_NGLK, v_NGLV, p = ctx.saved_tensors
        q, k, v, grad = (x.reshape(p.shape[0], -1, x.shape[-1]) for x in (q_NGMK, k_NGLK, v_NGLV, grad_NGMV))
        scale = q.shape[-1] ** -0.5
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        grad_q = torch.bmm(grad_scores, k).mul_(scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q).mul_(scale)
        grad_sink = None
        if ctx.sink is not None:
            num_heads, dtype = ctx.sink
            column = grad_scores[..., p.shape[-1] - SINK_COLUMNS].float()
            grad_sink = column.view(q_NGMK.shape[0], num_heads, ctx.num_rows).sum((0, 2)).to(dtype)
        return grad_q.view_as(q_NGMK), grad_k.view_as(k_NGLK), grad_v.view_as(v_NGLV), None, grad_sink


def _fused_causal(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, groups: int) -> Tensor:
    """PyTorch's fused attention, which wants equal QK and V dims: zero columns change nothing that is kept."""
    value_dim, width = v_BGSV.shape[-1], max(q_BHTK.shape[-1], v_BGSV.shape[-1])
    scale = q_BHTK.shape[-1] ** -0.5
    k_BHSK, v_BHSV = k_BGSK.repeat_interleave(groups, dim=1), v_BGSV.repeat_interleave(groups, dim=1)
    q_BHTK, k_BHSK, v_BHSV = (
        F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_BHTK, k_BHSK, v_BHSV)
    )
    out_BHTV = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSV, is_causal=True, scale=scale)
    return out_BHTV[..., :value_dim]


def make_plans(
    config: ModelConfig,
    position_ids_BT: Tensor,
    document_ids_BT: Tensor | None,
    dtype: torch.dtype,
    *,
    branch_ids_BT: Tensor | None = None,
    writes_cache: bool = False,
    is_invariant: bool = False,
) -> dict[AttentionKind, AttentionPlan]:
    """Rotary tables and masks for a whole-sequence pass, made once and shared by all layers and MTP heads.

    Without `document_ids_BT` each row is one document. The fused kernel keeps keys to itself, so a pass that fills a
    cache (`writes_cache`) does without it. `branch_ids_BT` and `is_invariant`: see `MiMoModel`.
    """
    fused = not writes_cache and not is_invariant and kernels.available(dtype, position_ids_BT.device)
    plans: dict[AttentionKind, AttentionPlan] = {}
    for kind in AttentionKind:
        geometry = config.attention(kind)
        theta, dim = geometry.rope_theta, config.rotary_dim(kind)
        cos, sin = rotary_tables(position_ids_BT, dim, theta, is_invariant=is_invariant)
        if is_invariant:
            documents = PackedDocuments(position_ids_BT, document_ids_BT, geometry.window_keys)
            plans[kind] = AttentionPlan(kind, cos, sin, None, attend=documents.attend)
        elif fused:
            ids = torch.zeros_like(position_ids_BT) if document_ids_BT is None else document_ids_BT
            first_BT, hole_BT2 = visible_keys(ids, branch_ids_BT, geometry.window_keys)
            cos, sin = cos.to(dtype).float(), sin.to(dtype).float()  # rounded as in the unfused form
            plans[kind] = AttentionPlan(kind, cos, sin, None, first_key_BT=first_BT, hole_BT2=hole_BT2)
        elif branch_ids_BT is not None:
            assert document_ids_BT is not None
            ids = (document_ids_BT, branch_ids_BT, position_ids_BT)
            biases = branch_biases(*ids, geometry.window_keys, dtype, sink=geometry.sink)
            plans[kind] = AttentionPlan(kind, cos, sin, None, row_biases=biases)
        elif kind is AttentionKind.GLOBAL:
            packed = document_ids_BT is not None
            biases = causal_biases(document_ids_BT, dtype, sink=geometry.sink) if packed else ()
            plans[kind] = AttentionPlan(kind, cos, sin, None, row_biases=biases)
        else:
            assert geometry.window_keys is not None
            ids = torch.zeros_like(position_ids_BT) if document_ids_BT is None else document_ids_BT
            bias, block = window_bias(ids, geometry.window_keys, dtype)
            bias = with_sink_columns(bias) if geometry.sink else bias
            plans[kind] = AttentionPlan(kind, cos, sin, bias, block_tokens=block)
    return plans


def make_cached_plans(
    config: ModelConfig, position_ids_BT: Tensor, cache: Cache, dtype: torch.dtype, *, is_invariant: bool = False
) -> dict[AttentionKind, AttentionPlan]:
    """Rotary tables and one mask row per query for a few new tokens on top of a cache."""
    plans: dict[AttentionKind, AttentionPlan] = {}
    for kind in AttentionKind:
        geometry = config.attention(kind)
        theta, dim = geometry.rope_theta, config.rotary_dim(kind)
        cos, sin = rotary_tables(position_ids_BT, dim, theta, is_invariant=is_invariant)
        key_positions_BS = cache.key_positions(kind)
        if is_invariant:
            ordered = order_keys(position_ids_BT, key_positions_BS, geometry.window_keys)
            plans[kind] = AttentionPlan(kind, cos, sin, None, cached=True, attend=ordered.attend)
            continue
        distance_BTS = position_ids_BT[:, :, None] - key_positions_BS[:, None, :]
        visible_BTS = (distance_BTS >= 0) & (key_positions_BS[:, None, :] >= 0)
        if geometry.window_keys is not None:
            visible_BTS &= distance_BTS < geometry.window_keys
        bias = additive_mask(visible_BTS, dtype)
        plans[kind] = AttentionPlan(kind, cos, sin, with_sink_columns(bias) if geometry.sink else bias, cached=True)
    return plans


def _stack_groups(q_BTHK: Tensor, groups: int) -> Tensor:
    """The R query heads that share keys become rows of one larger product: (B, T, G*R, K) -> (B, G, R*T, K)."""
    return q_BTHK.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _heads_per_group(q_BTHK: Tensor, k_BSGK: Tensor) -> int:
    num_heads, num_groups = q_BTHK.shape[2], k_BSGK.shape[2]
    if num_heads % num_groups:
        raise ShapeError(f"{num_heads} query heads cannot share {num_groups} key/value heads; G must divide H")
    return num_heads // num_groups
