"""What `torchrun` starts in the tests: restore a checkpoint on so many ranks, and write all of it as whole tensors."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file

from openmimo.__main__ import leave
from openmimo.config.io import read_model_config
from openmimo.config.train import OptimizerRecipe
from openmimo.model import build_model
from openmimo.parallel.parts import full_tensor
from openmimo.parallel.ranks import joined
from openmimo.parallel.sharding import shard_model
from openmimo.train.optimizer import MasterAdamW
from openmimo.train.state import restore_from


def main() -> None:
    """Arguments: step folder, file to write, ranks that divide the experts."""
    folder, target, expert_ranks = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with joined(expert_ranks, "cpu") if "WORLD_SIZE" in os.environ else nullcontext() as ranks:
        model = build_model(read_model_config(folder), seed=99)
        if ranks is not None:
            shard_model(model, ranks)
        optimizer = MasterAdamW.from_recipe(model, OptimizerRecipe(), ranks)
        restore_from(folder, model, optimizer, ranks)
        tensors = {**optimizer.state_tensors(), **{f"model.{name}": x for name, x in model.state_dict().items()}}
        whole = {name: full_tensor(tensor).detach().clone().contiguous() for name, tensor in tensors.items()}
        if ranks is None or ranks.is_first:
            save_file(whole, target)


if __name__ == "__main__":
    main()
    leave(0)
