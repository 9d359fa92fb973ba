"""Products in whole numbers and their quantised rows beside numpy, in every instruction set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

native = pytest.importorskip("openmimo._native", reason="this installation has no C++ runtime")

Floats = npt.NDArray[np.float32]
BLOCK = 32


def bf16(x: npt.NDArray[np.floating]) -> Floats:
    return torch.from_numpy(np.asarray(x, np.float32)).bfloat16().float().numpy()


def weight_levels(weight_OI: Floats, weights: str) -> tuple[Floats, Floats]:
    """Whole numbers and, for each output and input, their scale."""
    size = weight_OI.shape[1] if weights == "int8" else BLOCK
    scale_OI = np.ones_like(weight_OI)
    for begin in range(0, weight_OI.shape[1], size):
        most = np.abs(weight_OI[:, begin : begin + size]).max(1, keepdims=True)
        scale = most / np.float32(127) if weights == "int8" else bf16(most / np.float32(127))
        scale_OI[:, begin : begin + size] = np.where(most > 0, scale, 1)
    return np.clip(np.rint(weight_OI / scale_OI), -127, 127), scale_OI


def row_levels(x_TI: Floats) -> tuple[Floats, Floats]:
    level_TI, scale_TI = np.zeros_like(x_TI), np.ones_like(x_TI)
    for begin in range(0, x_TI.shape[1], BLOCK):
        part = x_TI[:, begin : begin + BLOCK]
        most = np.abs(part).max(1, keepdims=True)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        level_TI[:, begin : begin + BLOCK] = np.rint(part * inverse)
        scale_TI[:, begin : begin + BLOCK] = most / np.float32(127)
    return level_TI, scale_TI


@pytest.mark.parametrize("kernels", native.available_kernels())
@pytest.mark.parametrize("weights", ["int8", "int8_block"])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 128, 64), (4, 256, 128), (17, 130, 67), (3, 6, 5), (16, 512, 16), (9, 1028, 48), (70, 644, 90), (1, 2050, 33)],
)
def test_products_are_those_of_the_rounded_numbers(
    kernels: str, weights: str, rows: int, inputs: int, outputs: int
) -> None:
    """Catches wrong roundings, saturated sums, missing corrections, and steps lost at the ends of blocks and panels."""
    random = np.random.default_rng(0)
    x_TI = bf16(random.standard_normal((rows, inputs)) * np.exp(random.standard_normal((1, inputs))))
    weight_OI = random.standard_normal((outputs, inputs)).astype(np.float32)
    # The largest numbers of one sign everywhere: where sums of 16 bits would saturate.
    x_TI[0], weight_OI[0] = np.abs(x_TI[0]).max(), -3.0
    weight_OI[outputs // 2], x_TI[-1, : min(inputs, BLOCK) // 2] = 0, 0
    level_TI, x_scale_TI = row_levels(x_TI)
    level_OI, scale_OI = weight_levels(weight_OI, weights)
    a_TI, b_OI = level_TI.astype(float) * x_scale_TI, level_OI.astype(float) * scale_OI
    got_TO = np.empty((rows, outputs), np.float32)
    native.integer_product(kernels, weights, weight_OI, x_TI, got_TO)
    size_TO = np.abs(a_TI) @ np.abs(b_OI).T
    assert np.abs(got_TO - a_TI @ b_OI.T).max() <= 1e-6 * size_TO.max()
    for row in range(rows):  # Whatever the number of rows is, each has the same bits.
        alone_TO = np.empty((1, outputs), np.float32)
        native.integer_product(kernels, weights, weight_OI, x_TI[row : row + 1], alone_TO)
        assert (alone_TO[0] == got_TO[row]).all()


@pytest.mark.parametrize("weights", ["int8", "int8_block"])
def test_every_instruction_set_has_the_same_bits(weights: str) -> None:
    """Catches a kernel that sums blocks in another order, or rounds where the others do not."""
    random = np.random.default_rng(1)
    x_TI, weight_OI = bf16(random.standard_normal((19, 1030))), random.standard_normal((70, 1030)).astype(np.float32)
    results = []
    for kernels in native.available_kernels():
        got_TO = np.empty((19, 70), np.float32)
        native.integer_product(kernels, weights, weight_OI, x_TI, got_TO)
        results.append(got_TO)
    for got_TO in results[2:]:  # those with a fused multiply-add, which the plain kernels do not use
        assert (got_TO == results[1]).all()


def test_bad_operands_are_refused() -> None:
    """Catches sizes and names that C++ would trust."""
    x, out = np.zeros((2, 8), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="avx9"):
        native.integer_product("avx9", "int8", np.zeros((4, 8), np.float32), x, out)
    with pytest.raises(ValueError, match="int8 or int8_block, got fp8"):
        native.integer_product("scalar", "fp8", np.zeros((4, 8), np.float32), x, out)
    with pytest.raises(ValueError, match="fit"):
        native.integer_product("scalar", "int8", np.zeros((4, 9), np.float32), x, out)
