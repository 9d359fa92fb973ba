"""The C++ training kernels as differentiable functions on bf16 CPU tensors.

Callers ask `usable(x)` first and run their PyTorch form otherwise. Suffixes: B batch, T tokens, H query heads, G
key/value heads, K QK dim, V value dim, R half of the rotated dims, N rows, D columns, F expert width, k choices.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels.native import native_kernels

# Rows whose weight gradient is summed by one thread; fixed, so that the sum does not depend on their number.
SLICE_ROWS = 256


def usable(x: Tensor) -> bool:
    """Whether the kernels take this tensor: bf16, on the CPU, library built."""
    return available(x.dtype, x.device)


def available(dtype: torch.dtype, device: torch.device) -> bool:
    """`usable` before there is a tensor."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return native_kernels().library is not None


def call(name: str, *arguments: Tensor | float | int | None, num_elements: int) -> None:
    """Call a kernel: tensors as addresses, ints as int64, floats as float, the number of threads last."""
    library = native_kernels().library
    assert library is not None
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_contiguous() or argument.device.type != "cpu":
                raise ShapeError(f"{name} needs contiguous CPU tensors, got strides {argument.stride()}")
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_void_p(None) if argument is None else ctypes.c_int64(argument))
    # A parallel region costs about a microsecond, as much as 16k elements in one thread.
    threads = torch.get_num_threads() if num_elements > 16384 else 1
    getattr(library, f"openmimo_{name}")(*converted, ctypes.c_int(threads))


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention layer: query heads, key/value heads, QK dim, value dim, rotated dims / 2."""

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    rotary_half: int

    @property
    def width(self) -> int:
        """Columns of the joint projection."""
        return self.num_heads * self.qk_head_dim + self.num_kv_heads * (self.qk_head_dim + self.v_head_dim)


def attention(
    qkv_BTW: Tensor,
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    first_key_BT: Tensor,
    sink_H: Tensor | None,
    *,
    shape: AttentionShape,
    value_scale: float,
    hole_BT2: Tensor | None = None,
) -> Tensor:
    """Rotary embedding, value scale and causal softmax attention of the joint projection, without a mask or scores.

    Query t sees the keys first_key[t] .. t of its row, without those from hole[t, 0] to before hole[t, 1], which come
    after its first. Online softmax in fp32; only its normaliser is kept for the backward pass, which computes the
    scores again.
    Shapes: qkv (B, T, H*K + G*(K+V)) bf16, tables (B, T, R) fp32, first_key (B, T) and hole (B, T, 2) int32, sink (H,)
    -> (B, T, H, V).
    Raises: ShapeError if the tensors do not fit together.
    """
    batch, num_tokens, width = qkv_BTW.shape
    tables = (batch, num_tokens, shape.rotary_half)
    if width != shape.width or cos_BTR.shape != tables or sin_BTR.shape != tables:
        raise ShapeError(
            f"attention got a projection of {width} columns and tables {tuple(cos_BTR.shape)}, {tuple(sin_BTR.shape)}; "
            f"expected {shape.width} columns and {tables}"
        )
    if first_key_BT.shape != (batch, num_tokens) or first_key_BT.dtype is not torch.int32:
        raise ShapeError(
            f"first_key must be int32 {(batch, num_tokens)}, got {first_key_BT.dtype} {first_key_BT.shape}"
        )
    if hole_BT2 is not None and (hole_BT2.shape != (batch, num_tokens, 2) or hole_BT2.dtype is not torch.int32):
        raise ShapeError(f"hole must be int32 {(batch, num_tokens, 2)}, got {hole_BT2.dtype} {hole_BT2.shape}")
    if max(shape.qk_head_dim, shape.v_head_dim) > 1024 or shape.num_heads % shape.num_kv_heads:
        raise ShapeError(f"head dims must be at most 1024 and G must divide H, got {shape}")
    sink_H = None if sink_H is None else sink_H.float()
    tensors = (qkv_BTW.contiguous(), cos_BTR.float().contiguous(), sin_BTR.float().contiguous())
    hole_BT2 = None if hole_BT2 is None else hole_BT2.contiguous()
    return _Attention.apply(*tensors, first_key_BT.contiguous(), hole_BT2, sink_H, shape, value_scale)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        first_key: Tensor,
        hole: Tensor | None,
        sink: Tensor | None,
        shape: AttentionShape,
        value_scale: float,
    ) -> Tensor:
        batch, num_tokens, _ = qkv.shape
        out = qkv.new_empty(batch, num_tokens, shape.num_heads, shape.v_head_dim)
        lse = torch.empty(batch, shape.num_heads, num_tokens)
        ctx.sizes = (batch, num_tokens, shape.num_heads, shape.num_kv_heads, shape.qk_head_dim, shape.v_head_dim)
        ctx.sizes += (shape.rotary_half, shape.qk_head_dim**-0.5, value_scale)
        call("attention_forward", qkv, cos, sin, first_key, hole, sink, out, lse, *ctx.sizes, num_elements=1 << 20)
        ctx.save_for_backward(qkv, cos, sin, first_key, hole, sink, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, cos, sin, first_key, hole, sink, out, lse = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad_sink = torch.empty(lse.shape[:2])
        tensors = (qkv, cos, sin, first_key, hole, sink, out, lse, grad.contiguous(), grad_qkv, grad_sink)
        call("attention_backward", *tensors, *ctx.sizes, num_elements=1 << 20)
        return grad_qkv, None, None, None, None, None if sink is None else grad_sink.sum(0), None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32 over the last dim, rounded, times the weight."""
    return _RMSNorm.apply(x.contiguous(), None, weight_D, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, added: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its `rms_norm`, in one pass; backward too."""
    return _RMSNorm.apply(x.contiguous(), added.contiguous(), weight_D, eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Any:
        dim = x.shape[-1]
        total = x if added is None else torch.empty_like(x)
        y, scale = torch.empty_like(x), torch.empty(x.shape[:-1])
        tensors = (x, added, weight, total, y, scale)
        call("norm_forward", *tensors, x.numel() // dim, dim, eps, num_elements=x.numel())
        ctx.save_for_backward(total, weight, scale)
        ctx.adds = added is not None
        ctx.set_materialize_grads(False)
        return (total, y) if ctx.adds else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_total, grad = grads if ctx.adds else (None, *grads)
        total, weight, scale = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None
        dim, rows = total.shape[-1], scale.numel()
        grad_x = torch.empty_like(total)
        grad_weight = torch.empty(-(-rows // SLICE_ROWS), dim)
        grad_total = None if grad_total is None else grad_total.contiguous()
        tensors = (total, weight, scale, grad.contiguous(), grad_total, grad_x, grad_weight)
        call("norm_backward", *tensors, rows, dim, SLICE_ROWS, num_elements=total.numel())
        return grad_x, grad_x if ctx.adds else None, grad_weight.sum(0).to(weight.dtype), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for the two halves of the last dim, in fp32 in between."""
    return _SwiGLU.apply(gate_up.contiguous())  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        call("swiglu_forward", gate_up, out, gate_up.numel() // (2 * width), width, num_elements=gate_up.numel())
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        width = gate_up.shape[-1] // 2
        out = torch.empty_like(gate_up)
        sizes = (gate_up.numel() // (2 * width), width)
        call("swiglu_backward", gate_up, grad.contiguous(), out, *sizes, num_elements=gate_up.numel())
        return out


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    """Replace logits by the gradient of weight * -log softmax[target]; returns the weighted losses (N,), fp32."""
    rows, vocabulary = logits_NV.shape
    losses_N = torch.empty(rows)
    call("cross_entropy", logits_NV, targets_N, weights_N, losses_N, rows, vocabulary, num_elements=1 << 20)
    return losses_N
