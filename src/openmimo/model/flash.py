"""Softmax attention with a sink: the CPU's fused kernel, and a plain form for every other device.

Suffixes: B batch, H heads, T queries, S keys, K QK dim, V value dim.

A sink adds exp(b) to the softmax denominator. The fused kernel knows nothing of it, but returns the
log-sum-exp `lse` of each row, and

    out_sink = out * sigmoid(lse - b)          lse_sink = logaddexp(lse, b)

Its backward kernel rebuilds the probabilities from whatever `lse` it is given, so handing it `lse_sink` and
`out_sink` yields exact gradients of the sink form; the sink's own is -sum_t exp(b - lse_sink) * <dout, out_sink>.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_forward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, bias: Tensor | None, sink_H: Tensor | None
) -> Tensor:
    """Attention with scores scaled by K**-0.5, softmax in fp32, causal when `bias` is None.

    `sink_H` may have a multiple R of the H heads here: then the T rows are R stacked groups of T / R queries.
    Shapes: bias (B or 1, 1, T, S) additive -> out (B, H, T, V).
    """
    scale = 1.0 / math.sqrt(q_BHTK.shape[-1])
    sink_HT = None if sink_H is None else _sink_rows(sink_H, q_BHTK)
    if q_BHTK.device.type != "cpu":
        return plain_attention(q_BHTK, k_BHSK, v_BHSV, bias=bias, sink_HT=sink_HT, scale=scale)
    # The fused kernel wants equal QK and V dims; zero columns change neither scores nor the kept outputs.
    value_dim = v_BHSV.shape[-1]
    width = max(q_BHTK.shape[-1], value_dim)
    q_BHTK, k_BHSK, v_BHSV = (
        F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_BHTK, k_BHSK, v_BHSV)
    )
    out, _ = _flash(q_BHTK, k_BHSK, v_BHSV, bias, sink_HT, scale)
    return out[..., :value_dim]


def plain_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, *, bias: Tensor | None, sink_HT: Tensor | None, scale: float
) -> Tensor:
    """The same arithmetic spelled out, differentiable on any device; the oracle of the fused form."""
    scores = (q_BHTK @ k_BHSK.transpose(-1, -2)).float() * scale
    if bias is None:
        num_queries, num_keys = scores.shape[-2:]
        future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    else:
        scores = scores + bias.float()
    if sink_HT is not None:
        sink = sink_HT[None, :, :, None].expand(scores.shape[0], -1, -1, 1)
        scores = torch.cat((scores, sink.float()), dim=-1)
    probabilities = scores.softmax(dim=-1)[..., : k_BHSK.shape[-2]]
    return probabilities.to(v_BHSV.dtype) @ v_BHSV


@torch.library.custom_op("openmimo::flash_attention", mutates_args=())
def _flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sink_HT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _forward_cpu(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale)
    if sink_HT is not None:
        out = out * torch.sigmoid(lse - sink_HT)[..., None].to(out.dtype)
        lse = torch.logaddexp(lse, sink_HT.expand_as(lse))
    return out, lse


@_flash.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sink_HT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    # The kernel lays its output out as (B, T, H, V).
    batch, heads, rows, width = q.shape
    out = q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return out, q.new_empty(batch, rows, heads, dtype=torch.float32).transpose(1, 2)


@torch.library.custom_op("openmimo::flash_attention_backward", mutates_args=())
def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward_cpu(grad, q, k, v, out, lse, 0.0, bias is None, attn_mask=bias, scale=scale)
    return dq, dk, dv


@_flash_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    return like(q), like(k), like(v)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, sink_HT, scale = inputs
    ctx.save_for_backward(q, k, v, bias, sink_HT, *output)  # type: ignore[arg-type]
    ctx.scale = scale  # type: ignore[attr-defined]


def _gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias, sink_HT, out, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    dq, dk, dv = _flash_backward(grad, q, k, v, bias, out, lse, ctx.scale)  # type: ignore[attr-defined]
    dsink = None
    if sink_HT is not None:
        sink_mass = torch.exp(sink_HT - lse)
        dsink = -(sink_mass * (grad.float() * out.float()).sum(-1)).sum(0)
    return dq, dk, dv, None, dsink, None


_flash.register_autograd(_gradients, setup_context=_save)


def _sink_rows(sink: Tensor, q_BHTK: Tensor) -> Tensor:
    """One sink value per (head, row), in fp32; rows of a group-stacked q belong to its R heads in turn."""
    num_heads, num_rows = q_BHTK.shape[1:3]
    repeats = num_rows * num_heads // sink.shape[0]
    return sink.float().repeat_interleave(repeats).view(num_heads, num_rows)
