"""`torch.compile` accepts a layer and changes nothing in it."""

from __future__ import annotations

import shutil

import pytest
import torch

from openmimo.config.model import AttentionKind, preset
from openmimo.model.attention import make_plans
from openmimo.model.block import Block


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("index", "dtype", "bar"), [(0, torch.float32, 1e-5), (1, torch.bfloat16, 0.02)])
def test_a_compiled_layer_gives_the_same_output_and_gradient(index: int, dtype: torch.dtype, bar: float) -> None:
    """A custom gradient or in-place write traced wrongly. Grouped products compile in bfloat16 only.

    Layer 0 is global and dense, layer 1 sliding and sparse.
    """
    config = preset("nano")
    block = Block(config, index)
    for seed, parameter in enumerate(block.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
    block.to(dtype)
    kind = (AttentionKind.GLOBAL, AttentionKind.SLIDING)[index]
    plan = make_plans(config, torch.arange(70).expand(1, -1), None, dtype, writes_cache=True)[kind]
    x_BTD = torch.randn(1, 70, config.hidden_size, generator=torch.Generator().manual_seed(9)).to(dtype)
    _, routing = block(x_BTD, plan)
    replay_BTk = None if routing is None else routing.experts_BTk  # rounding must not change the choice
    outputs: list[torch.Tensor] = []
    for layer in (block, torch.compile(block, fullgraph=True)):
        leaf_BTD = x_BTD.clone().requires_grad_()
        y_BTD, _ = layer(leaf_BTD, plan, None, replay_BTk)
        y_BTD.float().square().mean().backward()
        assert leaf_BTD.grad is not None
        outputs += [y_BTD.detach().float(), leaf_BTD.grad.float()]
    for compiled, eager in ((outputs[2], outputs[0]), (outputs[3], outputs[1])):
        assert float((compiled - eager).norm() / eager.norm()) < bar
