"""Losses against plain oracles; each test names the mistake that it would catch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from openmimo.config.model import preset
from openmimo.model import build_model
from openmimo.train import losses as losses_module
from openmimo.train.losses import language_model_losses, linear_cross_entropy


@pytest.mark.parametrize("num_rows", [1, 7, 64, 65, 130])
def test_chunked_cross_entropy_equals_autograd_in_float64(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong chunk boundary, mean or gradient."""
    monkeypatch.setattr(losses_module, "CHUNK_ROWS", 64)
    generator = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 12, generator=generator, requires_grad=True)
    weight = torch.randn(33, 12, generator=generator, requires_grad=True)
    targets = torch.randint(33, (num_rows,), generator=generator)
    targets[num_rows // 2 :: 3] = -1
    if bool((targets < 0).all()):
        targets[0] = 5
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss * 1.7).backward()

    hidden64, weight64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(hidden64 @ weight64.T, targets, ignore_index=-1)
    (expected * 1.7).backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for got, want in ((hidden.grad, hidden64.grad), (weight.grad, weight64.grad)):
        assert got is not None
        assert want is not None
        assert torch.allclose(got.double(), want, atol=1e-5)


def test_no_targets_give_zero_loss_and_gradient() -> None:
    """Catches a division by zero on a batch whose targets are all masked."""
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(5, 8, requires_grad=True), torch.full((4,), -1))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) == 0.0


def test_targets_follow_mask_documents_and_head_offsets() -> None:
    """Catches a shift by one, a target across documents, and a masked token that counts."""
    config = preset("nano").replace(vocab_size=64, num_mtp_heads=2)
    model = build_model(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (2, 20), generator=generator)
    documents = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 20])
    positions = torch.tensor([[*range(9), *range(8), *range(3)], [*range(20)]])
    mask = torch.rand(2, 20, generator=generator) < 0.6
    mask[0, 17:] = False
    mask[:, 0] = False
    mask[0, 9] = False
    output = model(ids, position_ids_BT=positions, document_ids_BT=documents)
    got = language_model_losses(output, documents, mask, num_mtp_heads=2, mtp_weight=0.3, balance_weight=0.01)

    expected: list[float] = []
    counted: list[int] = []
    for shift, logits in ((1, output.logits), (2, output.mtp_logits(0)), (3, output.mtp_logits(1))):
        log_probs = logits.detach().double().log_softmax(-1)
        terms = [
            -float(log_probs[b, t, ids[b, t + shift]])
            for b in range(2)
            for t in range(20 - shift)
            if mask[b, t + shift] and documents[b, t] == documents[b, t + shift]
        ]
        expected.append(sum(terms) / len(terms))
        counted.append(len(terms))
    assert got.num_targets == counted[0]
    assert [float(got.next_token), *map(float, got.mtp)] == pytest.approx(expected, abs=1e-5)
    balance = sum(float(layer.balance_loss.detach()) for layer in output.routing)
    total = expected[0] + 0.3 * (expected[1] + expected[2]) / 2 + 0.01 * balance
    assert float(got.total.detach()) == pytest.approx(total, abs=1e-5)
    assert math.isfinite(total)
