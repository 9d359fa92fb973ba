"""Invariant products and exponentials: the same bits from C++ and PyTorch, for any number of rows, at any place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels import invariant, native, training

WITHOUT = native.NativeKernels(None, "switched off")
BUILDS = {"this processor": ("-march=native", "-fopenmp"), "any processor": ()}


@pytest.fixture(params=["PyTorch", *BUILDS])
def form(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The PyTorch form, and C++ with and without the processor's own instructions."""
    built = WITHOUT
    if request.param in BUILDS:
        compiler = native.find_compiler()
        if compiler is None:
            pytest.skip("no C++ compiler on this machine")
        path, _ = native.build(compiler, tmp_path_factory.getbasetemp() / "kernels", (BUILDS[request.param],))
        built = native.NativeKernels(ctypes.CDLL(str(path)), request.param)
    for module in (invariant, training):
        monkeypatch.setattr(module, "native_kernels", lambda: built)
    return request.param


def random(*shape: int) -> Tensor:
    """Numbers of every size, so that each order of summation gives other bits."""
    return torch.randn(shape) * torch.randn(shape).mul(2).exp()


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(torch.int32)


def lane_sums(x_MD: Tensor, weight_OD: Tensor) -> Tensor:
    """The product from its definition, one entry at a time."""
    depth = x_MD.shape[1]
    sums = torch.zeros(16, x_MD.shape[0], weight_OD.shape[0])
    for d in range(depth):
        sums[d % 16] = sums[d % 16] + x_MD[:, d, None] * weight_OD[None, :, d]
    for half in (8, 4, 2, 1):
        sums = sums[:half] + sums[half : 2 * half]
    return sums[0]


@pytest.mark.parametrize(
    ("rows", "outputs", "depth"), [(1, 1, 1), (3, 5, 16), (6, 67, 33), (70, 130, 48), (37, 9, 100)]
)
def test_products_are_the_defined_sums(form: str, rows: int, outputs: int, depth: int) -> None:
    """Catches contraction, reassociation, other code for remainders, and a thread's edge: bits, not tolerances."""
    x_MD, weight_OD = random(rows, depth), random(outputs, depth)
    y_MO = invariant.linear(x_MD, weight_OD)
    assert torch.equal(bits(y_MO), bits(lane_sums(x_MD, weight_OD)))
    alone = torch.cat([invariant.linear(row, weight_OD) for row in x_MD.split(1)])
    assert torch.equal(bits(alone), bits(y_MO))
    torch.testing.assert_close(y_MO.double(), x_MD.double() @ weight_OD.double().T, rtol=1e-4, atol=1e-3)


def test_the_bits_do_not_follow_threads_or_slices(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches sums that are split by threads, and slices of the PyTorch form that end inside a group."""
    x_GMD, weight_GOD = random(5, 50, 70), random(5, 40, 70)
    whole = invariant.batched_product(x_GMD, weight_GOD)
    torch.set_num_threads(1)
    monkeypatch.setattr(invariant, "SLICE_ELEMENTS", 16 * 40 * 7)
    assert torch.equal(bits(invariant.batched_product(x_GMD, weight_GOD)), bits(whole))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 40))
def test_groups_are_products_of_their_own(sizes: list[int], behind: int, depth: int) -> None:
    """Catches empty groups, rows behind the last group, and gradients that go to a neighbour."""
    ends_G = torch.tensor(sizes).cumsum(0)
    x_PD, weight_GOD = random(sum(sizes) + behind, depth), random(len(sizes), 6, depth)
    x_PD.requires_grad_()
    weight_GOD.requires_grad_()
    y_PO = invariant.grouped_product(x_PD, weight_GOD, ends_G)
    rows = [*x_PD.split([*sizes, behind])][:-1]
    expected = torch.cat([invariant.linear(x, weight) for x, weight in zip(rows, weight_GOD, strict=True)])
    assert torch.equal(bits(y_PO[: sum(sizes)]), bits(expected))
    assert not y_PO[sum(sizes) :].any()
    grad = torch.randn(y_PO.shape)
    found = torch.autograd.grad(y_PO, (x_PD, weight_GOD), grad)
    other = torch.autograd.grad(expected, (x_PD, weight_GOD), grad[: sum(sizes)])
    for mine, theirs in zip(found, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", [0, 1, 5, 8, 15, 16, 50])
def test_masked_entries_and_zeros_around_change_nothing(form: str, before: int) -> None:
    """What attention relies on: any number of keys before a window and behind the newest, masked ones in between."""
    weights_MC, values_VC = random(3, 40).abs(), random(5, 40)
    weights_MC[:, 7:11] = 0.0
    expected = invariant.linear(weights_MC, values_VC)
    other_values = values_VC.clone()
    other_values[:, 7:11] = -random(5, 4)
    longer = F.pad(other_values, (before, 0), value=-3.0), F.pad(values_VC, (0, 23), value=5.0)
    assert torch.equal(bits(invariant.linear(F.pad(weights_MC, (before, 0)), longer[0])), bits(expected))
    assert torch.equal(bits(invariant.linear(F.pad(weights_MC, (0, 23)), longer[1])), bits(expected))


def test_exponentials_do_not_follow_the_place(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches other code for the last elements of an array, and C++ whose bits are not PyTorch's."""
    x = torch.cat((torch.linspace(-100.0, 100.0, 20001), torch.randn(1000), torch.tensor([-torch.inf, torch.inf, 0.0])))
    y, share = invariant.exponential(x), invariant.sigmoid(x)
    exact = x.double().clamp(-87, 87).exp()
    assert ((y.double() - exact) / exact).abs().max() < 2e-7
    torch.testing.assert_close(share, torch.sigmoid(x), rtol=3e-7, atol=1e-37)
    for start, length in ((0, 1), (3, 17), (1, 15), (20001, 33), (5, 4099)):
        part = slice(start, start + length)
        assert torch.equal(bits(invariant.exponential(x[part])), bits(y[part]))
        assert torch.equal(bits(invariant.sigmoid(x[part])), bits(share[part]))
    monkeypatch.setattr(invariant, "native_kernels", lambda: WITHOUT)
    assert torch.equal(bits(invariant.exponential(x)), bits(y))


def test_cosines_and_sines_are_the_nearest_floats() -> None:
    """A wrong quadrant, or a range reduction that loses bits at long contexts."""
    angles = torch.cat((torch.arange(4000.0), torch.rand(4000) * 262144.0))
    for found, function in zip(invariant.cosine_sine(angles), (torch.cos, torch.sin), strict=True):
        torch.testing.assert_close(found, function(angles.double()).float(), rtol=1.2e-7, atol=0)
        part = invariant.cosine_sine(angles[3:8])[0 if function is torch.cos else 1]
        assert torch.equal(bits(part), bits(found[3:8]))


def test_gradients_agree_with_finite_differences() -> None:
    """Catches a missing factor in any hand-written backward pass; float64 takes the same functions."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(invariant.batched_product, (x, weight))
    for function in (invariant.mean_square, invariant.total, invariant.exponential, invariant.sigmoid):
        assert torch.autograd.gradcheck(function, (x,))


def test_no_rows_give_no_rows(form: str) -> None:
    """A step whose logits nobody wants."""
    assert invariant.linear(torch.ones(0, 4), torch.ones(3, 4)).shape == (0, 3)
    assert invariant.mean_square(torch.ones(2, 0, 4)).shape == (2, 0, 1)
    assert invariant.exponential(torch.ones(0, 4)).shape == (0, 4)


def test_other_types_and_shapes_are_refused() -> None:
    """Catches a bf16 model that is switched to the invariant mode and silently takes another path."""
    with pytest.raises(ShapeError, match="fp32"):
        invariant.linear(torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16())
    with pytest.raises(ShapeError, match="expected"):
        invariant.grouped_product(torch.ones(2, 4), torch.ones(1, 3, 5), torch.tensor([2]))
