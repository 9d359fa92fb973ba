"""Arithmetic whose bits depend on its operands alone: not on batch, place, padding, threads or processor.

Matrix libraries choose their order of summation by shape, and vector units treat the last elements of an array unlike
the others. Here every operation is made of single IEEE operations in one order, so what a token gives is the same
alone and in any company, and the C++ kernels and the PyTorch forms give the same bits. Everything is made of two:

- the product: entry d goes to lane d % LANES, every lane adds up its products from 0 in rising order, then lane l takes
  lane l + 8, l + 4, l + 2, l + 1, modulo what is left. Zeros for masked entries change nothing, nor do zeros before or
  behind: they turn the lanes, and halves meet in the same pairs wherever the first lane is;
- the exponential, a polynomial.

Tensors are fp32; float64, for checks of gradients, takes the PyTorch forms. Gradients are right but not invariant:
backward passes use the libraries.

Suffixes: N rows, P rows sorted by group, G groups, M rows of a group, D depth, O outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels.native import native_kernels
from openmimo.kernels.training import call

LANES = 16
# Products that the PyTorch form holds at once, in elements.
SLICE_ELEMENTS = 1 << 20


def linear(x: Tensor, weight_OD: Tensor) -> Tensor:
    """x @ weight.T over the last dim. Shapes: (..., D) -> (..., O)."""
    x_1ND = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    return batched_product(x_1ND, weight_OD[None]).view(*x.shape[:-1], weight_OD.shape[0])


def batched_product(x_GMD: Tensor, weight_GOD: Tensor) -> Tensor:
    """x[g] @ weight[g].T for every g. Shapes: -> (G, M, O)."""
    groups, rows = x_GMD.shape[:2]
    ends_G = torch.arange(1, groups + 1) * rows
    return grouped_product(x_GMD.flatten(0, 1), weight_GOD, ends_G).view(groups, rows, weight_GOD.shape[1])


def grouped_product(x_PD: Tensor, weight_GOD: Tensor, ends_G: Tensor) -> Tensor:
    """Rows up to each group's end times that group's matrix; rows behind the last group are 0. Shapes: -> (P, O).

    Raises: ShapeError on tensors that do not fit together or are neither fp32 nor float64.
    """
    dtypes = {x_PD.dtype, weight_GOD.dtype}
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise ShapeError(f"invariant products are in fp32, got {x_PD.dtype} and {weight_GOD.dtype}; cast the model")
    if x_PD.shape[1] != weight_GOD.shape[2] or ends_G.shape != weight_GOD.shape[:1]:
        raise ShapeError(
            f"product of {tuple(x_PD.shape)} and {tuple(weight_GOD.shape)} with {tuple(ends_G.shape)} groups; "
            "expected (P, D), (G, O, D) and (G,)"
        )
    return _GroupedProduct.apply(x_PD, weight_GOD, ends_G)  # type: ignore[no-any-return]


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, weight_GOD: Tensor, ends_G: Tensor) -> Tensor:
        ends_G = ends_G.to("cpu", torch.int64)
        ends = ends_G.tolist()
        ctx.save_for_backward(x_PD, weight_GOD)
        ctx.ranges = list(zip([0, *ends], ends, strict=False))
        longest = max((end - begin for begin, end in ctx.ranges), default=0)
        out_PO = x_PD.new_zeros(x_PD.shape[0], weight_GOD.shape[1])
        if _has_kernels(x_PD):
            groups, outputs, depth = weight_GOD.shape
            tensors = (x_PD.contiguous(), weight_GOD.contiguous(), ends_G, out_PO)
            work = out_PO.numel() * depth // 64  # products cost less than what the limit of `call` is meant for
            call("invariant_product", *tensors, groups, outputs, depth, longest, num_elements=work)
        elif longest and all(end - begin == longest for begin, end in ctx.ranges):
            x_GMD = x_PD[: ends[-1]].unflatten(0, (len(ends), longest))
            out_PO[: ends[-1]] = _product(x_GMD, weight_GOD).flatten(0, 1)
        else:
            for (begin, end), weight_OD in zip(ctx.ranges, weight_GOD, strict=True):
                out_PO[begin:end] = _product(x_PD[None, begin:end], weight_OD[None])[0]
        return out_PO

    @staticmethod
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_PD, weight_GOD = ctx.saved_tensors
        ranges = ctx.ranges
        size, end = (ranges[0][1], ranges[-1][1]) if ranges else (0, 0)
        grad_x = grad_weight = None
        if all(stop - begin == size for begin, stop in ranges):
            grad_GMO = grad_PO[:end].unflatten(0, (len(ranges), size))
            if ctx.needs_input_grad[0]:
                grad_x = F.pad(torch.bmm(grad_GMO, weight_GOD).flatten(0, 1), (0, 0, 0, x_PD.shape[0] - end))
            if ctx.needs_input_grad[1]:
                grad_weight = torch.bmm(grad_GMO.transpose(1, 2), x_PD[:end].unflatten(0, (len(ranges), size)))
            return grad_x, grad_weight, None
        grad_x, grad_weight = torch.zeros_like(x_PD), torch.empty_like(weight_GOD)
        for group, (begin, stop) in enumerate(ranges):
            grad_x[begin:stop] = grad_PO[begin:stop] @ weight_GOD[group]
            grad_weight[group] = grad_PO[begin:stop].T @ x_PD[begin:stop]
        return grad_x, grad_weight, None


def _product(x_GMD: Tensor, weight_GOD: Tensor) -> Tensor:
    """The PyTorch form, in slices of groups and rows. Lanes come first, so that each operation runs over outputs."""
    num_outputs = weight_GOD.shape[1]
    step_rows = max(1, SLICE_ELEMENTS // (LANES * num_outputs))
    step_groups = max(1, SLICE_ELEMENTS // (LANES * num_outputs * max(1, min(step_rows, x_GMD.shape[1]))))
    out_GMO = x_GMD.new_empty(*x_GMD.shape[:2], num_outputs)
    for group in range(0, x_GMD.shape[0], step_groups):
        weight_JLGO = _lanes(weight_GOD[group : group + step_groups])
        for row in range(0, x_GMD.shape[1], step_rows):
            x_JLGM = _lanes(x_GMD[group : group + step_groups, row : row + step_rows])
            sum_LGMO = x_GMD.new_zeros(*x_JLGM.shape[1:], num_outputs)
            for x_LGM, weight_LGO in zip(x_JLGM, weight_JLGO, strict=True):
                sum_LGMO += x_LGM[..., None] * weight_LGO[:, :, None]
            while sum_LGMO.shape[0] > 1:
                low, high = sum_LGMO.chunk(2)
                sum_LGMO = low + high
            out_GMO[group : group + step_groups, row : row + step_rows] = sum_LGMO[0]
    return out_GMO


def _lanes(x_GMD: Tensor) -> Tensor:
    """Shapes: -> (D / LANES, LANES, G, M), the depth filled up with zeros."""
    padded = F.pad(x_GMD, (0, -x_GMD.shape[-1] % LANES))
    return padded.unflatten(-1, (-1, LANES)).permute(2, 3, 0, 1).contiguous()


def total(x: Tensor) -> Tensor:
    """The sum over the last dim. Shapes: (..., D) -> (..., 1)."""
    return linear(x, x.new_ones(1, x.shape[-1]))


def mean_square(x: Tensor) -> Tensor:
    """The mean of squares over the last dim. Shapes: (..., D) -> (..., 1)."""
    rows_N1D = x.reshape(math.prod(x.shape[:-1]), 1, x.shape[-1])
    # Not a division: on some devices PyTorch replaces that by the inverse anyway.
    return batched_product(rows_N1D, rows_N1D).view(*x.shape[:-1], 1) * (1.0 / x.shape[-1])


def exponential(x: Tensor) -> Tensor:
    """e^x with a relative error below 2e-7, for x in [-87, 87]; others are moved there."""
    return _Exponential.apply(x)  # type: ignore[no-any-return]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return _Sigmoid.apply(x)  # type: ignore[no-any-return]


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _exponential(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.saved_tensors[0]


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 1.0 / (_exponential(-x) + 1.0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return grad * (y * (1.0 - y))


def _exponential(x: Tensor) -> Tensor:
    if x.dtype is torch.float64:
        return x.exp()
    if _has_kernels(x):
        x = x.contiguous()
        y = torch.empty_like(x)
        call("invariant_exponential", x, y, x.numel(), num_elements=x.numel())
        return y
    x = x.clamp(-87.0, 87.0)
    n = (x * 1.44269504088896341 + 12582912.0) - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def _has_kernels(x: Tensor) -> bool:
    on_cpu = x.dtype is torch.float32 and x.device.type == "cpu"
    return on_cpu and native_kernels().library is not None


# pi / 2 in three parts; whole multiples up to 2^20 of the first two are exact. Source of all constants: fdlibm.
_HALF_PI = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SINE = (
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
)
_COSINE = (
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
)


def cosine_sine(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of fp32 angles up to 2^20, computed in float64 and rounded once. No gradient."""
    angles = angles.double()
    quarters = (angles * (2 / math.pi)).round()
    rest = angles
    for part in _HALF_PI:
        rest = rest - quarters * part
    square = rest * rest
    sine, cosine = torch.full_like(rest, _SINE[0]), torch.full_like(rest, _COSINE[0])
    for coefficient in _SINE[1:]:
        sine = sine * square + coefficient
    for coefficient in _COSINE[1:]:
        cosine = cosine * square + coefficient
    sine = rest + rest * square * sine
    cosine = (1.0 - square * 0.5) + square * square * cosine
    place = quarters.to(torch.int64) & 3
    odd = (place & 1).bool()
    cos, sin = torch.where(odd, sine, cosine), torch.where(odd, cosine, sine)
    cos = torch.where((place == 1) | (place == 2), -cos, cos)
    sin = torch.where(place >= 2, -sin, sin)
    return cos.float(), sin.float()
