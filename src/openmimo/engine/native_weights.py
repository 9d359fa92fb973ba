"""The weights of the native runtime, part by part: of a model, or straight from the files of a checkpoint.

Suffixes: R rows, D columns, C blocks of 128 columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmimo.checkpoint.fp8 import RowScaled
from openmimo.checkpoint.load import OpenCheckpoint, open_checkpoint
from openmimo.checkpoint.names import HubTensor
from openmimo.errors import CheckpointError
from openmimo.model import MiMoModel

# Parts of the runtime by the names of the model's state, relative to a layer.
LAYER_PARTS = {
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "post_norm",
    "pre_mlp_layernorm.weight": "post_norm",
    "self_attn.qkv_proj.weight": "qkv",
    "self_attn.o_proj.weight": "o",
    "self_attn.attention_sink_bias": "sinks",
    "mlp.gate.weight": "router",
    "mlp.gate.e_score_correction_bias": "router_bias",
    "mlp.gate_up_proj.weight": "gate_up",
    "mlp.down_proj.weight": "down",
    "mlp.experts.gate_up_proj": "expert_gate_up",
    "mlp.experts.down_proj": "expert_down",
    "enorm.weight": "embedding_norm",
    "hnorm.weight": "hidden_norm",
    "final_layernorm.weight": "final_norm",
    "eh_proj.weight": "join",
}
WHOLE_PARTS = {"embed_tokens.weight": "embedding", "norm.weight": "norm", "lm_head.weight": "head"}
E4M3_NAN = 0x7F


@dataclass(frozen=True, kw_only=True)
class NativeWeight:
    """What goes where; `layer` counts MTP heads after the main layers.

    `values` are float32, bfloat16 as uint16, or, with `scales` (R, C), E4M3 codes.
    """

    part: str
    layer: int
    expert: int
    values: Any
    scales: Any = None


def weights_of_model(model: MiMoModel) -> Iterator[NativeWeight]:
    """Every weight of a model, without copies where it is on the CPU."""
    for name, tensor in model.state_dict().items():
        part, layer = _place(name, model.config.num_layers)
        for expert, one in enumerate(tensor if part.startswith("expert_") else (tensor,)):
            yield NativeWeight(part=part, layer=layer, expert=expert, values=_array(one))


def weights_of_folder(folder: Path, weights: str, *, verify: bool) -> Iterator[NativeWeight]:
    """Every weight of a checkpoint folder, as `load_model` would give it, but one at a time.

    For "fp8" the E4M3 blocks of the files stay what they are; in everything else they become numbers, in bfloat16 first
    unless `weights` is "float32".
    Raises: CheckpointError, ConfigError as `load_model`.   Cost: memory for the largest weight, twice.
    """
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    with open_checkpoint(folder, verify=verify) as checkpoint:
        for (target, expert), group in groupby(checkpoint.tensors, key=lambda tensor: (tensor.target, tensor.expert)):
            part, layer = _place(target, checkpoint.config.num_layers)
            weight = partial(NativeWeight, part=part, layer=layer, expert=expert or 0)
            rows = list(group)
            codes = _codes(checkpoint, rows) if weights == "fp8" else None
            if codes is not None:
                values_RD, scales_RC = (torch.cat(parts) for parts in zip(*codes, strict=True))
                yield weight(values=values_RD.numpy(), scales=scales_RC.numpy())
                continue
            values = _array(_numbers(checkpoint, rows, dtype))
            yield weight(values=values)
            if part == "embedding" and checkpoint.config.tie_embeddings:  # the files have no head then
                yield NativeWeight(part="head", layer=0, expert=0, values=values)


def _place(name: str, num_layers: int) -> tuple[str, int]:
    """Part and layer of a tensor of the model's state."""
    if name in WHOLE_PARTS:
        return WHOLE_PARTS[name], 0
    group, index, rest = name.split(".", 2)
    return LAYER_PARTS[rest], int(index) + (num_layers if group == "mtp_heads" else 0)


def _numbers(checkpoint: OpenCheckpoint, rows: list[HubTensor], dtype: torch.dtype) -> Tensor:
    """The tensors of the files that make up one weight, below one another."""
    parts = [checkpoint.reader.read(each, checkpoint.config).to(torch.float32 if each.fp32 else dtype) for each in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _codes(checkpoint: OpenCheckpoint, rows: list[HubTensor]) -> list[tuple[Tensor, Tensor]] | None:
    """E4M3 codes as bytes, and their scales by row; None unless all the tensors are FP8."""
    found: list[tuple[Tensor, Tensor]] = []
    for each in rows:
        one: RowScaled | None = checkpoint.reader.row_scaled(each, checkpoint.config)
        if one is None:
            return None
        codes_RD = one.weight.view(torch.uint8)
        if bool(((codes_RD & E4M3_NAN) == E4M3_NAN).any()):
            raise CheckpointError(f"{each.name} holds NaN, which no weight can be; copy the checkpoint again")
        found.append((codes_RD, one.scale_RC))
    return found


def _array(tensor: Tensor) -> Any:
    """fp32, or bf16 as the uint16 that the extension expects."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.float().numpy()
