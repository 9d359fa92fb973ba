"""From logits to tokens. Suffixes: B batch, T tokens of a step, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from openmimo.engine.request import SamplingParams


def choose_greedy(logits_BTV: Tensor) -> Tensor:
    """The most probable token at every position, the lowest id among equals. Shape (B, T)."""
    return logits_BTV.argmax(-1)


def logprobs_of(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Log-probability of the given tokens at temperature 1, in fp32. Shape (B, T)."""
    return logits_BTV.float().log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]


def sample(logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at `uniform_B` in [0, 1).

    Temperature first, then top-k, then top-p on what is left (the token that crosses `top_p` is kept).
    Returns tokens and their log-probabilities under the distribution drawn from, both of shape (B,).
    """
    logits_BV = logits_BV.double() / params.temperature
    order_BV = None
    if params.top_k or params.top_p < 1.0:
        # Stable, so that ties are broken the same way on every run.
        logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        if params.top_k:
            logits_BV = logits_BV[:, : params.top_k]
        probs_BV = logits_BV.softmax(-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        logits_BV = logits_BV.masked_fill(before_BV >= params.top_p, float("-inf"))
    cumulative_BV = logits_BV.softmax(-1).cumsum(-1)
    total_B1 = cumulative_BV[:, -1:]
    # `right` and a target below the total skip tokens of probability 0, whose value equals their predecessor's.
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    picked_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    logprobs_B = logits_BV.log_softmax(-1).gather(-1, picked_B1)[:, 0]
    tokens_B = picked_B1[:, 0] if order_BV is None else order_BV.gather(-1, picked_B1)[:, 0]
    return tokens_B, logprobs_B
