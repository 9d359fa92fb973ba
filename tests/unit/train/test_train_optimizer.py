"""The optimiser, the guard before it, schedules and monitors."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from openmimo.config.model import preset
from openmimo.kernels import optimizer as kernels
from openmimo.model import build_model
from openmimo.train.monitors import expert_load, num_zeros
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.schedule import learning_rate
from openmimo.train.step import StepSettings, train_step

SETTINGS = StepSettings(num_mtp_heads=1, mtp_weight=0.3, balance_weight=1e-5, bias_update_rate=1e-3)


@pytest.mark.parametrize("native", [True, False])
def test_fp32_step_equals_torch_adamw_with_clipping(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a missing clip, decay on the wrong parameters, and masters that drift from the model."""
    if not native:
        monkeypatch.setattr(kernels, "adamw_usable", lambda tensors: False)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 5), nn.Linear(6, 5)
    theirs.load_state_dict(ours.state_dict())
    optimizer = MasterAdamW(ours.named_parameters(), weight_decay=0.1, grad_clip=0.5)
    reference = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    for step in range(4):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        for module in (ours, theirs):
            module.zero_grad()
            (module(x).square().sum() * 3).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step(0.01)
        reference.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-7)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-7)


def test_bf16_update_matches_float64() -> None:
    """Catches a wrong moment, bias correction or rounding, entries behind the last whole register, and a lost step."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((17,), (3, 40), (5, 4001))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    optimizer = MasterAdamW([(str(i), p) for i, p in enumerate(parameters)], weight_decay=0.1, grad_clip=1e9)
    expected = [nn.Parameter(p.detach().double()) for p in parameters]
    groups = [{"params": expected[1:], "weight_decay": 0.1}, {"params": expected[:1], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95))
    for step in range(3):
        for index, (parameter, twin) in enumerate(zip(parameters, expected, strict=True)):
            if index == 1 and step == 1:
                parameter.grad = twin.grad = None
                continue
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            twin.grad = parameter.grad.double()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
        assert optimizer.step(0.02) == pytest.approx(norm, rel=1e-6)
        reference.step()
    for master, parameter, twin in zip(optimizer.masters, parameters, expected, strict=True):
        torch.testing.assert_close(master.detach().double(), twin.detach(), rtol=0, atol=2e-6)
        assert torch.equal(parameter, master.bfloat16())


def test_bf16_weights_follow_fp32_masters() -> None:
    """Catches updates that are lost because they are smaller than a bf16 step."""
    layer = nn.Linear(4, 4, bias=False).bfloat16()
    start = layer.weight.detach().clone()
    optimizer = MasterAdamW(layer.named_parameters(), weight_decay=0.0)
    for _ in range(300):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step(1e-5)
    moved = (start.float() - optimizer.masters[0].detach()).mean()
    assert float(moved) == pytest.approx(300e-5, rel=1e-2)
    assert torch.equal(layer.weight, optimizer.masters[0].bfloat16())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_gradient_changes_nothing(poison: float) -> None:
    """Catches an optimiser step, or a balance-bias update, taken on a broken gradient."""
    config = preset("nano").replace(vocab_size=64, num_mtp_heads=1)
    model = build_model(config)
    optimizer = MasterAdamW(model.named_parameters())
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    common = (torch.zeros_like(ids), torch.arange(16).expand(2, 16), torch.ones(2, 16, dtype=torch.bool))
    assert train_step(model, optimizer, ids, *common, learning_rate=1e-3, settings=SETTINGS).applied
    with torch.no_grad():
        model.norm.weight[3] = poison
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    result = train_step(model, optimizer, ids, *common, learning_rate=1e-3, settings=SETTINGS)
    assert not result.applied
    assert all(torch.equal(before[n], v) or n == "norm.weight" for n, v in model.state_dict().items())
    assert all(torch.equal(moments[n], v) for n, v in optimizer.state_tensors().items())


def test_untrained_heads_keep_their_weights() -> None:
    """Catches weight decay or momentum moving MTP heads that a stage does not train."""
    model = build_model(preset("nano").replace(vocab_size=64, num_mtp_heads=3))
    optimizer = MasterAdamW(model.named_parameters())
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    before = {n: p.clone() for n, p in model.mtp_heads[2].named_parameters()}
    common = (torch.zeros_like(ids), torch.arange(16).expand(2, 16), torch.ones(2, 16, dtype=torch.bool))
    train_step(model, optimizer, ids, *common, learning_rate=1e-2, settings=SETTINGS)
    assert all(torch.equal(before[n], p) for n, p in model.mtp_heads[2].named_parameters())


def test_num_zeros_counts_by_layer_and_expert_group() -> None:
    """Catches a count that misses parameters without gradient or puts experts into the wrong group."""
    model = build_model(preset("nano").replace(vocab_size=64, num_mtp_heads=1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    experts = model.layers[2].mlp.experts
    experts.down_proj.grad[3] = 0.0
    model.layers[4].self_attn.o_proj.weight.grad = None
    counts = num_zeros(model)
    assert counts["layers.2.experts"] == counts["layers.2"] == experts.down_proj[3].numel()
    assert counts["layers.4"] == model.layers[4].self_attn.o_proj.weight.numel()
    assert counts["layers.4.experts"] == 0
    assert counts["all"] == counts["layers.2"] + counts["layers.4"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norms_pass_counts_zeros_as_torch_does(dtype: torch.dtype) -> None:
    """Catches lanes behind a parameter's end or a chunk that are counted, and counts under another parameter's name."""
    generator = torch.Generator().manual_seed(1)
    module = nn.ParameterDict(
        {f"p{size}": nn.Parameter(torch.ones(size, dtype=dtype)) for size in (1, 15, 16, 17, 16384, 16385, 40000)}
    )
    module["unused"] = nn.Parameter(torch.ones(5, dtype=dtype))
    for name, parameter in module.items():
        if name != "unused":
            parameter.grad = torch.randint(-1, 2, parameter.shape, generator=generator).to(dtype) * -0.5
    optimizer = MasterAdamW(module.named_parameters())
    optimizer.step(1e-3)
    if not kernels.adamw_usable([module["p1"]]):
        assert optimizer.zero_counts is None
        pytest.skip("without the kernels the monitor counts by itself")
    expected = {n: int((p.grad == 0).sum()) for n, p in module.items() if p.grad is not None}
    assert optimizer.zero_counts == expected
    assert num_zeros(module, optimizer.zero_counts) == num_zeros(module)
    assert num_zeros(module)["all"] == sum(expected.values()) + 5


def test_expert_load_ratio() -> None:
    assert expert_load(torch.tensor([[4, 4, 4, 4], [8, 4, 4, 0]])) == {"worst": 2.0, "mean": 1.5}


def test_schedules_hit_their_ends() -> None:
    """Catches an off-by-one in warm-up or decay."""
    for kind, end in (("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)):
        rates = [learning_rate(kind, s, steps=100, warmup=10, start=1.0, end=0.1) for s in range(100)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9] == pytest.approx(1.0)
        assert rates[-1] == pytest.approx(end)
        assert all(a >= b - 1e-12 for a, b in pairwise(rates[10:]))
    middle = learning_rate("cosine", 5, steps=11, warmup=0, start=1.0, end=0.0)
    assert middle == pytest.approx(0.5)
    assert math.isfinite(learning_rate("cosine", 0, steps=1, warmup=0, start=1.0, end=0.0))
