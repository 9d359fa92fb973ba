"""Products of bf16 on processors without instructions for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openmimo.kernels import products


@pytest.fixture
def no_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bf16_products", lambda: False)


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.usefixtures("no_hardware")
def test_a_product_is_that_of_the_numbers_rounded_once() -> None:
    """Sums in bf16, or an operand that is not the one that was stored."""
    a_NK, b_KM = random_bf16(64, 300), random_bf16(300, 40)
    assert products.through_fp32(a_NK)
    exact = a_NK.double() @ b_KM.double()
    torch.testing.assert_close(products.matmul(a_NK, b_KM).double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.usefixtures("no_hardware")
def test_linear_has_the_gradients_of_linear() -> None:
    """A gradient of the other operand, a transpose, or one of a tensor that needs none."""
    x, weight_OI = random_bf16(3, 20, 48).requires_grad_(), random_bf16(24, 48).requires_grad_()
    grad = random_bf16(3, 20, 24)
    y = products.linear(x, weight_OI)
    y.backward(grad)
    twin_x, twin_weight = x.detach().double().requires_grad_(), weight_OI.detach().double().requires_grad_()
    expected = twin_x @ twin_weight.T
    expected.backward(grad.double())
    for found, exact in ((y, expected), (x.grad, twin_x.grad), (weight_OI.grad, twin_weight.grad)):
        assert found is not None
        assert exact is not None
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
    frozen = weight_OI.detach()
    products.linear(x.detach().requires_grad_(), frozen).sum().backward()
    assert frozen.grad is None


def test_other_products_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware for bf16 that is not used, fp32 that is copied, or decoding that converts all weights for a few rows."""
    monkeypatch.setattr(products, "has_bf16_products", lambda: True)
    assert not products.through_fp32(random_bf16(64, 32))
    monkeypatch.setattr(products, "has_bf16_products", lambda: False)
    assert products.through_fp32(random_bf16(64, 32))
    assert not products.through_fp32(random_bf16(64, 32).float())
    assert not products.through_fp32(random_bf16(8, 32))
    assert not products.through_fp32(random_bf16(64, 32).to("meta"))
