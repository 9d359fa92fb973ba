"""Where a run computes, without needing a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmimo.config.train import Precision
from openmimo.data.packing import Batch
from openmimo.errors import ConfigError
from openmimo.kernels.native import NativeKernels
from openmimo.train import device
from openmimo.train.device import compute_dtype, pick_device, random_state, set_random_state, to_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_step_and_a_resume_stay_on_the_models_device() -> None:
    """A tensor made on the CPU in the middle of a step, or moments that a resume leaves there."""
    script = Path(__file__).with_name("fake_device_run.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("one step on fakegpu")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that stands idle, or a recipe for one that fails inside PyTorch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"'cuda' is not there, PyTorch sees 0 CUDA devices; use device='cpu'"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (pick_device("auto"), pick_device("cuda:1"), pick_device("cpu")) == (CUDA, torch.device("cuda:1"), CPU)
    with pytest.raises(ConfigError, match="sees 2 CUDA devices"):
        pick_device("cuda:2")


def test_bf16_is_chosen_for_the_device_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor asked for a run on the GPU, or the GPU for a run on the processor; emulated bf16 chosen."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for hardware, fast in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(device, "has_bf16_products", lambda hardware=hardware: hardware)
        kernels = NativeKernels(None, "", fast=fast)
        monkeypatch.setattr(device, "native_kernels", lambda kernels=kernels: kernels)
        assert compute_dtype(Precision.AUTO, CUDA) is torch.bfloat16
        assert compute_dtype(Precision.AUTO, CPU) is (torch.bfloat16 if hardware or fast else torch.float32)
    assert compute_dtype(Precision.BF16, CPU) is torch.bfloat16
    assert compute_dtype(Precision.FP32, CUDA) is torch.float32


def test_all_tensors_of_a_batch_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that stays behind, or a copy that waits for the GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    ids_BT = torch.zeros(2, 3, dtype=torch.int64)
    fields = {name: ids_BT for name in ("token_ids_BT", "document_ids_BT", "position_ids_BT", "loss_mask_BT")}
    batch = Batch(**fields, num_tokens=6, num_targets=5, cursor={"x": 1})
    assert to_device(batch, CPU) is batch
    moved = to_device(batch, torch.device("meta"))
    assert {getattr(moved, name).device.type for name in fields} == {"meta"}
    assert (moved.num_tokens, moved.cursor) == (6, {"x": 1})


def test_the_random_state_of_the_gpu_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that resumes on a GPU with other random numbers."""
    given: list[tuple[torch.Tensor, torch.device]] = []
    state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: given.append((value, device)))
    assert set(random_state(CPU)) == {"rng"}
    saved = random_state(CUDA)
    expected = torch.rand(3)
    set_random_state(saved, CUDA)
    assert torch.equal(torch.rand(3), expected)
    assert given == [(state, CUDA)]
    set_random_state(saved, CPU)  # goes on without the GPU
    assert len(given) == 1
