"""Log-probabilities of chosen tokens without the logits, against autograd through all of them."""

from __future__ import annotations

import pytest
import torch

from openmimo.rl import logprobs as module
from openmimo.rl.logprobs import token_logprobs


@pytest.mark.parametrize("chunk", [1, 3, 2048])
def test_values_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a temperature that reaches the value and not the gradient, and rows lost between chunks."""
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (7,), generator=generator)
    temperature = torch.rand(7, generator=generator, dtype=torch.float64) + 0.5
    factors = torch.randn(7, generator=generator, dtype=torch.float64)
    got = token_logprobs(hidden, weight, targets, temperature)
    (got.logprobs_N * factors).sum().backward()
    mine = (hidden.grad, weight.grad)
    hidden.grad = weight.grad = None
    full = (hidden @ weight.T / temperature[:, None]).log_softmax(-1)
    chosen = full.gather(1, targets[:, None])[:, 0]
    assert torch.allclose(got.logprobs_N, chosen, rtol=1e-12)
    assert torch.allclose(got.entropy_N, -(full.exp() * full).sum(-1), rtol=1e-12)
    (chosen * factors).sum().backward()
    for one, other in zip(mine, (hidden.grad, weight.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_bf16_inputs_give_fp32_logits() -> None:
    """Logits rounded to bf16 would be off by up to 2^-8 of their size."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 64, generator=generator).bfloat16()
    weight = torch.randn(100, 64, generator=generator).bfloat16()
    targets = torch.randint(100, (50,), generator=generator)
    got = token_logprobs(hidden, weight, targets, torch.ones(50)).logprobs_N
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert float((got - exact).abs().max()) < 1e-4


def test_no_rows() -> None:
    """A row of padding alone has nothing to say and must not fail."""
    got = token_logprobs(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert got.logprobs_N.shape == got.entropy_N.shape == (0,)
