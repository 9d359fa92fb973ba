"""The norm's written-out gradient, and a whole layer's."""

from __future__ import annotations

import pytest
import torch
from model_oracle import random_model, random_tokens, small_config

from openmimo.model import cast_model
from openmimo.model.block import RMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_its_gradient_match_float64(dtype: torch.dtype) -> None:
    """A term of the hand-written gradient that is lost, or an epsilon outside the root."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, 1e-2)
    torch.nn.init.normal_(norm.weight, generator=generator)
    norm.to(dtype)
    x_BTD = (torch.randn(3, 5, 24, generator=generator) * 0.2).to(dtype).requires_grad_()
    direction_BTD = torch.randn(3, 5, 24, generator=generator).to(dtype)
    y_BTD = norm(x_BTD)
    (y_BTD * direction_BTD).sum().backward()
    x64_BTD, weight64_D = (t.detach().double().requires_grad_() for t in (x_BTD, norm.weight))
    exact_BTD = x64_BTD / (x64_BTD.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight64_D
    (exact_BTD * direction_BTD.double()).sum().backward()
    tolerance = 1e-6 if dtype is torch.float32 else 0.01
    for ours, exact in ((y_BTD, exact_BTD), (x_BTD.grad, x64_BTD.grad), (norm.weight.grad, weight64_D.grad)):
        assert ours is not None
        assert exact is not None
        assert float((ours.double() - exact).detach().norm() / exact.detach().norm()) < tolerance


def test_every_parameter_gets_a_gradient_that_predicts_the_change_of_the_loss() -> None:
    """A parameter cut off from the loss, or a gradient along the whole path that is off by a factor."""
    model = random_model(small_config())
    tokens_BT = random_tokens(model.config, 2, 12)
    routes = model(tokens_BT).routed_experts  # fixed, so that a small step changes no choice

    def loss() -> torch.Tensor:
        output = model(tokens_BT, routed_experts_BTLk=routes)
        heads = sum(output.mtp_logits(head).square().mean() for head in range(3))
        return output.logits.square().mean() + heads

    loss().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    for part in ("norm", "qkv_proj", "sink_bias", "gate.weight", "experts", "eh_proj", "embed"):
        chosen = [p for name, p in model.named_parameters() if part in name and p.grad is not None]
        length = torch.stack([p.grad.square().sum() for p in chosen if p.grad is not None]).sum().sqrt()
        with torch.no_grad():
            step = 3e-3
            for p in chosen:
                p += step * p.grad / length
            high = loss()
            for p in chosen:
                p -= 2 * step * p.grad / length
            low = loss()
            for p in chosen:
                p += step * p.grad / length
        assert float((high - low) / (2 * step)) == pytest.approx(float(length), rel=0.02), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(dtype: torch.dtype) -> None:
    """Catches a layer or head that is not recomputed, and a second pass with other masks, routes or losses."""
    model = cast_model(random_model(small_config()), dtype)
    tokens_BT = random_tokens(model.config, 2, 24)
    documents_BT = torch.arange(24).expand(2, -1).div(9, rounding_mode="floor").to(torch.int32)
    routes = model(tokens_BT).routed_experts.flip(-1)
    grads: list[list[torch.Tensor]] = []
    kept: list[int] = []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages.setdefault(storage.data_ptr(), 0 if storage.data_ptr() in weights else storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = model(tokens_BT, document_ids_BT=documents_BT, routed_experts_BTLk=routes)
            hidden = [output.hidden_BTD, *(output.mtp_hidden(head) for head in range(3))]
        kept.append(sum(storages.values()))
        balance = sum(layer.balance_loss for layer in output.routing)
        (sum(each.float().square().mean() for each in hidden) + 0.1 * balance).backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) > 20
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)
    # What is outside of layers and heads; their inputs, which recomputation keeps, are not saved by an operation.
    assert kept[1] < kept[0] / 10
