"""A training step on a device that only exists in name, run by test_train_device.py in a process of its own.

PyTorch can register one device of one's own, for good; its tensors are fakes that know shapes and devices, so an
operation that mixes devices, or makes a tensor on the CPU, fails as it would on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from openmimo.config.model import preset
from openmimo.model import MiMoModel
from openmimo.train.monitors import expert_load, num_zeros
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.step import StepSettings, train_step

DEVICE = "fakegpu:0"


def put_on_device(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(FakeTensor(mode, parameter.detach(), torch.device(DEVICE)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = FakeTensor(mode, buffer, torch.device(DEVICE))


def know_no_values() -> None:
    """What asks a fake for its values gets some."""
    Tensor.nonzero = lambda self: torch.arange(self.numel(), device=self.device)[:, None]
    FakeTensor.tolist = lambda self: [1] * self.numel()
    Tensor.__bool__ = lambda self: True
    Tensor.__float__ = lambda self: 1.0


def main() -> None:
    _setup_privateuseone_for_python_backend("fakegpu")
    config = preset("nano").replace(vocab_size=64, num_mtp_heads=1)
    with torch.device("meta"):
        model = MiMoModel(config).to(torch.bfloat16)
    mode = FakeTensorMode()
    put_on_device(model, mode)
    know_no_values()
    settings = StepSettings(num_mtp_heads=1, mtp_weight=0.3, balance_weight=1e-5, bias_update_rate=1e-3)
    with mode:
        optimizer = MasterAdamW(model.named_parameters())
        ids_BT = torch.zeros(2, 100, dtype=torch.int64, device=DEVICE)
        documents_BT = torch.zeros_like(ids_BT, dtype=torch.int32)
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        result = train_step(
            model, optimizer, ids_BT, documents_BT, documents_BT, mask_BT, learning_rate=1e-3, settings=settings
        )
        assert result.applied
        assert all(p.grad is not None and str(p.grad.device) == DEVICE for p in model.parameters())
        assert result.tokens_per_expert_LE is not None
        expert_load(result.tokens_per_expert_LE)
        model.norm.weight.grad = None
        num_zeros(model)

        saved = {name: torch.empty_like(value, device="cpu") for name, value in optimizer.state_tensors().items()}
        optimizer.load_state_tensors(saved)
        assert {str(x.device) for x in optimizer.state_tensors().values()} == {DEVICE}

        whole = model(ids_BT)
        assert str(whole.routed_experts.device) == str(whole.mtp_logits(0).device) == DEVICE
    print("one step on", DEVICE)


if __name__ == "__main__":
    main()
