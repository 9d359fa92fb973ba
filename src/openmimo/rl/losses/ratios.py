"""Importance weights: what the policy's probability of a token is over that of the distribution it was drawn from.

Suffix: N answer tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RatioBounds(NamedTuple):
    """Where a ratio counts: [low, high], both included. `caps_N` truncates weights further, for tokens of older
    versions of the weights (infinite where it should not).
    """

    low: float
    high: float
    caps_N: Tensor | None = None


class Weights(NamedTuple):
    """`weights_N` is the ratio inside the bounds and 0 outside (detached), `kept_N` says which is which."""

    ratio_N: Tensor
    weights_N: Tensor
    kept_N: Tensor


def masked_ratios(logprobs_N: Tensor, sampled_N: Tensor, bounds: RatioBounds) -> Weights:
    """Equation 8: w = sg[pi / mu] where it lies within the bounds, and 0 elsewhere."""
    ratio_N = torch.exp(logprobs_N.detach() - sampled_N)
    kept_N = (ratio_N >= bounds.low) & (ratio_N <= bounds.high)
    weights_N = ratio_N if bounds.caps_N is None else torch.minimum(ratio_N, bounds.caps_N)
    return Weights(ratio_N, torch.where(kept_N, weights_N, torch.zeros_like(weights_N)), kept_N)


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """(reward - mean) / standard deviation within each group of answers to one prompt; 0 where all are equal.

    Source: GRPO (DeepSeekMath), with the population's deviation.
    """
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    deviation_P1 = centred_PG.square().mean(1, keepdim=True).sqrt()
    # Equal rewards may differ from their mean by rounding, which must not be blown up.
    equal_P1 = rewards_PG.amax(1, keepdim=True) == rewards_PG.amin(1, keepdim=True)
    return torch.where(equal_P1, torch.zeros_like(centred_PG), centred_PG / deviation_P1.clamp(min=1e-12))


def token_weights(lengths_S: Tensor, sequence_N: Tensor, share_S: Tensor) -> Tensor:
    """1 / |y| of each token's answer times the answer's share of the loss: the mean over sequences of equation 7."""
    return (share_S / lengths_S)[sequence_N]
