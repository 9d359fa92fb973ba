"""Training losses: next-token and multi-token cross-entropy without keeping the logits.

Suffixes: B batch, T tokens, D hidden, N selected tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openmimo.kernels import training as kernels
from openmimo.kernels.products import matmul
from openmimo.model import ModelOutput

# Rows of logits alive at once: small enough that a chunk stays in the last-level cache.
CHUNK_ROWS = 1024
# The last chunk is filled up to a multiple of this, so that matrix products come in few sizes.
ROW_MULTIPLE = 128


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden @ weight.T`, one chunk of rows at a time.

    The gradient is formed in the forward pass, where the chunk's probabilities are at hand, so no
    (N, V) tensor outlives a chunk. Softmax and sums are in fp32. Targets of -1 do not count.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        num_rows = hidden_ND.shape[0]
        weights_N1 = (targets_N >= 0).float()[:, None]
        weights_N1 = weights_N1 / weights_N1.sum().clamp(min=1.0)
        needs_grad = any(ctx.needs_input_grad[:2])
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        grad_weight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if needs_grad else None
        for start in range(0, num_rows, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            targets_n1 = targets_N[rows, None].clamp(min=0)
            weights_n1 = weights_N1[rows]
            if needs_grad and kernels.usable(hidden_ND):
                grad_nV = matmul(hidden_ND[rows], weight_VD.T)
                loss += kernels.cross_entropy_(grad_nV, targets_n1[:, 0], weights_n1[:, 0]).sum()
                assert grad_hidden_ND is not None
                assert grad_weight_VD is not None
                grad_hidden_ND[rows] = matmul(grad_nV, weight_VD)
                grad_weight_VD += matmul(grad_nV.T, hidden_ND[rows])
                continue
            log_probs_nV = matmul(hidden_ND[rows], weight_VD.T).log_softmax(-1, dtype=torch.float32)
            loss -= (log_probs_nV.gather(1, targets_n1) * weights_n1).sum()
            if grad_hidden_ND is not None and grad_weight_VD is not None:
                grad_nV = log_probs_nV.exp_().mul_(weights_n1).scatter_add_(1, targets_n1, -weights_n1)
                grad_nV = grad_nV.to(hidden_ND.dtype)
                grad_hidden_ND[rows] = matmul(grad_nV, weight_VD)
                grad_weight_VD += matmul(grad_nV.T, hidden_ND[rows])
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grad.to(grad_hidden_ND.dtype), (grad_weight_VD * grad).to(ctx.weight_dtype), None


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean of -log softmax(hidden @ weight.T)[target] over the rows whose target is not -1; 0 when there is none.

    Shapes: hidden (N, D), weight (V, D), targets (N,) -> scalar fp32.   Cost: 6*N*D*V FLOPs, CHUNK_ROWS*V*4 bytes.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Losses:
    """What one batch cost. `total` is what is differentiated; the others are for the log.

    `mtp` has one entry per trained head, `balance` is the mean sequence balance loss of the sparse layers.
    """

    total: Tensor
    next_token: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor
    num_targets: int


def language_model_losses(
    output: ModelOutput,
    document_ids_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_mtp_heads: int,
    mtp_weight: float,
    balance_weight: float,
    weigh: Callable[[int], float] | None = None,
) -> Losses:
    """Next-token loss, the mean of the MTP heads' losses times `mtp_weight`, and the weighted balance loss.

    `weigh` gives what a mean over so many targets counts where other ranks have other numbers of them.

    Token t + 1 + s is a target of position t (s = 0 for the main model, k + 1 for head k) when the loss mask has it
    and both lie in one document. Source: MiMo-V2-Flash report, training objective.
    """
    model = output.model
    weight_VD = model.lm_head.weight

    def loss_at(shift: int, hidden_BTD: Tensor) -> tuple[Tensor, int]:
        num_sources = max(0, document_ids_BT.shape[1] - shift)
        same_document = document_ids_BT[:, shift:] == document_ids_BT[:, :num_sources]
        wanted = loss_mask_BT[:, shift:] & same_document
        rows_N = wanted.flatten().nonzero()[:, 0]
        targets_N = output.token_ids_BT[:, shift:].flatten().index_select(0, rows_N)
        filler = -rows_N.shape[0] % ROW_MULTIPLE
        rows_N, targets_N = F.pad(rows_N, (0, filler)), F.pad(targets_N, (0, filler), value=-1)
        hidden_ND = hidden_BTD[:, :num_sources].flatten(0, 1).index_select(0, rows_N)
        num_targets = rows_N.shape[0] - filler
        mean = linear_cross_entropy(hidden_ND, weight_VD, targets_N)
        return mean if weigh is None else mean * weigh(num_targets), num_targets

    next_token, num_targets = loss_at(1, model.norm(output.hidden_BTD))
    mtp = tuple(loss_at(2 + head, output.mtp_hidden(head))[0] for head in range(num_mtp_heads))
    total = next_token
    if mtp:
        total = total + mtp_weight * torch.stack(mtp).mean()
    balance = torch.zeros((), device=next_token.device)
    if output.routing:
        balance = torch.stack([layer.balance_loss for layer in output.routing]).mean()
        total = total + balance_weight * balance * len(output.routing)
    return Losses(total, next_token.detach(), tuple(loss.detach() for loss in mtp), balance.detach(), num_targets)
