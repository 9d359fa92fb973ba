"""Tensors that may be divided among ranks; for others PyTorch's distributed part is not even imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Files of a training state that several ranks wrote.
PARTS = "shard-*.safetensors"


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor; it shares the tensor's memory."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[operator]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[operator]


def like(part: Tensor, parameter: Any) -> Tensor:
    """The whole whose part on this rank is given, divided as a parameter is."""
    if not is_divided(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def part_of(whole: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, as a parameter is divided."""
    if not is_divided(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def is_divided(tensor: Any) -> bool:
    """Whether it is a part of a larger one."""
    return hasattr(tensor, "to_local")
