"""Log-probabilities of chosen tokens, differentiable, without keeping the logits.

Suffixes: N tokens, n a chunk of them, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmimo.engine import SamplingParams
from openmimo.engine.sampler import recorded_logprobs

# Rows of logits alive at once.
CHUNK_ROWS = 2048


class TokenLogProbs(NamedTuple):
    """For each token its log-probability (differentiable) and the distribution's entropy in nats (not)."""

    logprobs_N: Tensor
    entropy_N: Tensor


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature_N: Tensor) -> TokenLogProbs:
    """log softmax(hidden @ weight.T / temperature) at the targets.

    Logits are products in fp32 whatever the inputs are: rounded to bf16 they would differ from a sampler's by more
    than all else. Shapes: hidden (N, D), weight (V, D), others (N,) -> (N,) twice, fp32.
    Cost: 8*N*D*V FLOPs with the backward pass, CHUNK_ROWS*V*8 bytes.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return TokenLogProbs(*_TokenLogProbs.apply(hidden_ND, weight_VD, targets_N, temperature_N))  # type: ignore[misc]
    return _forward(hidden_ND, weight_VD, targets_N, temperature_N)


def scaled_logits(hidden_ND: Tensor, weight_VD: Tensor, temperature_N: Tensor) -> Tensor:
    """Logits over temperature in fp32 (fp64 for fp64 inputs), shape (N, V)."""
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    return hidden_ND.to(dtype) @ weight_VD.to(dtype).T / temperature_N.to(dtype)[:, None]


def _forward(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature_N: Tensor) -> TokenLogProbs:
    logprobs: list[Tensor] = []
    entropy: list[Tensor] = []
    for start in range(0, len(targets_N), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        log_nV = scaled_logits(hidden_ND[rows], weight_VD, temperature_N[rows]).log_softmax(-1)
        logprobs.append(log_nV.gather(1, targets_N[rows, None])[:, 0])
        entropy.append(-(log_nV.exp() * log_nV).sum(-1))
    if not logprobs:
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        return TokenLogProbs(empty, empty.clone())
    return TokenLogProbs(torch.cat(logprobs), torch.cat(entropy))


def exact_logprobs(
    logits_NV: Tensor, targets_N: Tensor, temperature_N: Tensor, sequence_N: Tensor, top_p: float
) -> TokenLogProbs:
    """The same from fp32 logits, with the sampler's own function for the values: equal logits give equal bits.

    `sequence_N` says which answer each token belongs to; answers are contiguous. Gradients are those of log softmax.
    """
    log_NV = (logits_NV / temperature_N[:, None]).log_softmax(-1)
    smooth_N = log_NV.gather(1, targets_N[:, None])[:, 0]
    values: list[float] = []
    ends = [*(sequence_N.diff().nonzero()[:, 0] + 1).tolist(), len(sequence_N)]
    for start, end in zip([0, *ends], ends, strict=False):
        params = SamplingParams(temperature=float(temperature_N[start]), top_p=top_p)
        logits_TV = logits_NV[start:end].detach().numpy()
        values += recorded_logprobs(logits_TV, targets_N[start:end].tolist(), params)
    recorded_N = torch.tensor(values, dtype=torch.float32)
    logprobs_N: Tensor = _WithValues.apply(smooth_N, recorded_N)  # type: ignore[assignment]
    return TokenLogProbs(logprobs_N, -(log_NV.exp() * log_NV).sum(-1).detach())


class _WithValues(torch.autograd.Function):
    """The second argument's values with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, values_N: Tensor) -> Tensor:
        return values_N.clone()

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_N, None


class _TokenLogProbs(torch.autograd.Function):
    """Computes each chunk's probabilities again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, temperature_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, entropy_N = _forward(hidden_ND, weight_VD, targets_N, temperature_N)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, temperature_N)
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        hidden_ND, weight_VD, targets_N, temperature_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=grad_N.dtype)
        weight = weight_VD.to(grad_N.dtype)
        for start in range(0, len(targets_N), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            # d log p[target] / d logits = (onehot - p) / temperature
            grad_nV = scaled_logits(hidden_ND[rows], weight_VD, temperature_N[rows]).softmax(-1).neg_()
            grad_nV.scatter_add_(1, targets_N[rows, None], torch.ones_like(grad_nV[:, :1]))
            grad_nV *= (grad_N[rows] / temperature_N[rows].to(grad_N.dtype))[:, None]
            grad_hidden_ND[rows] = (grad_nV @ weight).to(hidden_ND.dtype)
            grad_weight_VD += grad_nV.T @ hidden_ND[rows].to(grad_N.dtype)
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None, None
