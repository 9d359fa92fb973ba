"""FP8 training: both operands of a product in e4m3, a power of two as scale for each row, sums in fp32 (torchao).

What stays as it is: attention's output projections, embedding and output head (bf16), routers (fp32), everything that
is no product. Source: MiMo-V2-Flash report, pre-training; torchao's rowwise recipe in the place of its tiles of 128.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from openmimo.errors import ConfigError
from openmimo.model import MiMoModel
from openmimo.model.linear import Linear
from openmimo.model.moe import Experts

# Linear maps that stay in bf16, by the last part of their name.
KEPT = ("o_proj", "lm_head")
# What the products of GPUs want of every dim.
DIM_MULTIPLE = 16
# Compute capability of the first GPUs that multiply e4m3.
FIRST_CAPABILITY = (8, 9)


def use_fp8(model: MiMoModel, device: torch.device) -> None:
    """Let the model's products run in FP8, in place; parameters stay the same objects, in bf16.

    GPUs without FP8 products and CPUs emulate them: the operands' bits are the same, and it is slow.
    Raises: ConfigError without torchao, or for dims that FP8 products do not take.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("precision='fp8' needs torchao, which is not installed; run `pip install 'openmimo[fp8]'`")
    _demand_dims(model)
    float8: Any = importlib.import_module("torchao.float8")
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    config = replace(float8.Float8LinearConfig.from_recipe_name("rowwise"), emulate=not native, pad_inner_dim=True)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=_is_converted)
    products = ExpertProducts(config)
    for module in model.modules():
        if isinstance(module, Experts):
            module.product = products


class ExpertProducts:
    """`grouped_product` with FP8 operands, an expert at a time."""

    def __init__(self, config: Any) -> None:
        linear: Any = importlib.import_module("torchao.float8.float8_linear")
        self._config, self._apply = config, linear.matmul_with_hp_or_float8_args.apply
        # The settings of its three products, which only a module works out.
        self._products = linear.Float8Linear(DIM_MULTIPLE, DIM_MULTIPLE, bias=False, config=config).linear_mm_config

    def __call__(self, x_PD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
        """Rows up to each group's end times that group's matrix; rows behind the last group are zero."""
        ends = ends_E.tolist()
        groups = [
            self._apply(x_PD[start:end], weight, self._products, self._config)
            for start, end, weight in zip([0, *ends], ends, weight_EDF, strict=False)
            if end > start
        ]
        return torch.cat([*groups, x_PD.new_zeros(x_PD.shape[0] - ends[-1], weight_EDF.shape[2])])


def _is_converted(module: nn.Module, name: str) -> TypeGuard[Linear]:
    return isinstance(module, Linear) and name.rpartition(".")[2] not in KEPT


def _demand_dims(model: MiMoModel) -> None:
    for name, module in model.named_modules():
        if _is_converted(module, name):
            _demand(name, module.weight.shape)
        elif isinstance(module, Experts):
            for key, weight in module.named_parameters():
                _demand(f"{name}.{key}", weight.shape[1:])


def _demand(name: str, shape: torch.Size) -> None:
    if any(dim % DIM_MULTIPLE for dim in shape):
        raise ConfigError(
            f"precision='fp8' wants dims in multiples of {DIM_MULTIPLE}, but {name} has {tuple(shape)}; "
            "change the model or train in bf16"
        )
