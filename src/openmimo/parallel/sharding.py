"""Plans that divide a model among ranks, applied from outside: FSDP2 for all weights, experts on parts first."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from openmimo.errors import ConfigError
from openmimo.model import MiMoModel
from openmimo.model.moe import Experts, Router, SparseMLP
from openmimo.parallel.exchange import ExpertExchange
from openmimo.parallel.parts import full_tensor
from openmimo.parallel.ranks import Ranks

# Gradients are summed over ranks in fp32, whatever the weights are.
POLICY = MixedPrecisionPolicy(reduce_dtype=torch.float32)


def shard_model(model: MiMoModel, ranks: Ranks) -> MiMoModel:
    """Divide a whole model, the same on every rank, in place.

    Each layer and head is gathered for its turn. With several parts a layer's experts lie on them, and only tokens
    move; the copies of a part divide its weights. A gradient is the mean over all ranks' tokens.
    Raises: ConfigError if the experts cannot be divided so.
    """
    if ranks.parts.size() > 1:
        _divide_experts(model, ranks)
    everyone = ranks.everyone
    for module in model.modules():
        if isinstance(module, Router):  # fp32 among bf16 weights, and a group has one dtype
            fully_shard(module, mesh=everyone, mp_policy=POLICY)
    for layer in (*model.layers, *model.mtp_heads):
        fully_shard(layer, mesh=everyone, mp_policy=POLICY)
    fully_shard(model, mesh=everyone, mp_policy=POLICY)
    return model


def _divide_experts(model: MiMoModel, ranks: Ranks) -> None:
    moe, parts, copies = model.config.moe, ranks.parts, ranks.copies
    if moe is None or moe.num_experts % parts.size():
        raise ConfigError(
            f"parallel.expert_ranks={parts.size()} does not divide the experts "
            f"({moe.num_experts if moe else 'there are none'}); choose a divisor"
        )
    if any(size % copies.size() for size in (2 * moe.expert_dim, model.config.hidden_size)):
        raise ConfigError(
            f"{copies.size()} copies of the experts' parts cannot divide widths of {2 * moe.expert_dim} and "
            f"{model.config.hidden_size}; choose another parallel.expert_ranks"
        )
    for module in model.modules():
        if not isinstance(module, SparseMLP):
            continue
        experts: Experts = module.experts
        for name, weight in list(experts.named_parameters(recurse=False)):
            divided = distribute_tensor(weight.detach(), parts, [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(divided))
        experts.exchange = ExpertExchange(parts.get_group(), moe.num_experts)
        fully_shard(experts, mesh=copies, mp_policy=POLICY, shard_placement_fn=lambda _: Shard(1))


@torch.no_grad()
def whole_model(model: MiMoModel) -> MiMoModel:
    """An undivided copy on every rank, on the CPU. Cost: memory for all weights."""
    copy = MiMoModel(model.config)
    copy.recompute = model.recompute
    for name, value in model.state_dict().items():
        module_name, _, key = name.rpartition(".")
        module = copy.get_submodule(module_name)
        tensor = full_tensor(value).cpu()
        if key in module._parameters:  # pyright: ignore[reportPrivateUsage]
            setattr(module, key, nn.Parameter(tensor.clone()))
        else:
            setattr(module, key, tensor.clone())
    if model.config.tie_embeddings:
        copy.lm_head.weight = copy.embed_tokens.weight
    return copy
