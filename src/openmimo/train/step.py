"""One training step: forward, losses, backward, guard, update, balance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openmimo.data.packing import Batch
from openmimo.model import MiMoModel
from openmimo.model.moe import update_balance_bias
from openmimo.train.losses import Losses, language_model_losses
from openmimo.train.optimizer import MasterAdamW

if TYPE_CHECKING:
    from openmimo.parallel.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a stage fixes for its steps."""

    num_mtp_heads: int
    mtp_weight: float
    balance_weight: float
    bias_update_rate: float


@dataclass(frozen=True)
class StepResult:
    """`applied` is False when the loss or gradient was not finite: then nothing was changed."""

    losses: Losses
    grad_norm: float
    tokens_per_expert_LE: Tensor | None
    applied: bool


def train_step(
    model: MiMoModel,
    optimizer: MasterAdamW,
    token_ids_BT: Tensor,
    document_ids_BT: Tensor,
    position_ids_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    learning_rate: float,
    settings: StepSettings,
    ranks: Ranks | None = None,
) -> StepResult:
    """Update the model once. Gradients stay on the parameters until the next step, for the monitors.

    With `ranks` each of them has rows of its own, as many as the others; losses and load are those of all rows.
    """
    optimizer.zero_grad()
    output = model(token_ids_BT, position_ids_BT=position_ids_BT, document_ids_BT=document_ids_BT)
    losses = language_model_losses(
        output,
        document_ids_BT,
        loss_mask_BT,
        num_mtp_heads=settings.num_mtp_heads,
        mtp_weight=settings.mtp_weight,
        balance_weight=settings.balance_weight,
        weigh=None if ranks is None else ranks.weight,
    )
    losses.total.backward()
    grad_norm = optimizer.step(learning_rate)
    applied = math.isfinite(grad_norm)
    load_LE = torch.stack([layer.tokens_per_expert_E for layer in output.routing]) if output.routing else None
    if ranks is not None:
        losses = _of_all(losses, ranks)
        load_LE = None if load_LE is None else ranks.sum(load_LE)
    if applied and load_LE is not None:
        for router, load_E in zip(model.routers(), load_LE, strict=True):
            update_balance_bias(router, load_E, settings.bias_update_rate)
    return StepResult(losses, grad_norm, load_LE, applied)


@torch.no_grad()
def evaluate(model: MiMoModel, batch: Batch) -> Losses:
    """The main model's next-token loss on a batch; nothing is trained."""
    output = model(batch.token_ids_BT, position_ids_BT=batch.position_ids_BT, document_ids_BT=batch.document_ids_BT)
    return language_model_losses(
        output, batch.document_ids_BT, batch.loss_mask_BT, num_mtp_heads=0, mtp_weight=0.0, balance_weight=0.0
    )


def _of_all(losses: Losses, ranks: Ranks) -> Losses:
    parts = (losses.total, losses.next_token, losses.balance, *losses.mtp)
    total, next_token, balance, *mtp = ranks.mean(torch.stack([part.detach().float() for part in parts]))
    (num_targets,) = ranks.sums(losses.num_targets)
    return Losses(total, next_token, tuple(mtp), balance, int(num_targets))
