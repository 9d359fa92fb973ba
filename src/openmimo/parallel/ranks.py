"""The processes of one run, as `torchrun` starts them, and what they tell one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from openmimo.errors import ConfigError, MimoError

T = TypeVar("T")

# Dimensions of the mesh: copies of the experts' division, and the parts of one.
COPIES, PARTS = "copies", "parts"


@dataclass(frozen=True)
class Ranks:
    """This process among `size` equal ones. The mesh is (copies, parts): a layer's experts lie on the parts."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def everyone(self) -> DeviceMesh:
        """All ranks in one dimension."""
        return self.mesh[COPIES, PARTS]._flatten("everyone")  # pyright: ignore[reportPrivateUsage]

    @property
    def parts(self) -> DeviceMesh:
        return self.mesh[PARTS]

    @property
    def copies(self) -> DeviceMesh:
        return self.mesh[COPIES]

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64; the same on all of them."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, without gradient."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks, without gradient."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def weight(self, num_targets: int) -> float:
        """What this rank's mean over its targets counts in a mean over ranks, so that every target counts the same."""
        (total,) = self.sums(num_targets)
        return num_targets * self.size / total if total else 0.0

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank."""
        return self.sums(float(flag))[0] > 0

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; its error too."""
        made: list[Any] = [None]
        if self.is_first:
            try:
                made = [(True, make())]
            except MimoError as error:
                made = [(False, error)]
        dist.broadcast_object_list(made, src=0)
        succeeded, result = made[0]
        if not succeeded:
            raise result
        return result

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier()


@contextmanager
def joined(expert_ranks: int = 1, device: str = "auto") -> Generator[Ranks]:
    """Join the other processes that `torchrun` started, and leave them at the end.

    NCCL between GPUs, one for each process of a machine; gloo between CPUs.
    Raises: ConfigError if `expert_ranks` does not divide the number of processes, or a GPU is missing.
    """
    size = int(os.environ["WORLD_SIZE"])
    if expert_ranks < 1 or size % expert_ranks:
        raise ConfigError(f"parallel.expert_ranks={expert_ranks} must divide the number of processes, {size}")
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        if (place.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"process {place.index} of this machine has no GPU, PyTorch sees {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs"
            )
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        shape = (size // expert_ranks, expert_ranks)
        mesh = init_device_mesh(place.type, shape, mesh_dim_names=(COPIES, PARTS))
        yield Ranks(rank=dist.get_rank(), size=size, device=place, mesh=mesh)
    finally:
        dist.destroy_process_group()
