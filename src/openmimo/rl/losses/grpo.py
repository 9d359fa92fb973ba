"""Group-relative policy optimisation on outcome rewards.

Suffix: N answer tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmimo.rl.losses.ratios import RatioBounds, masked_ratios


def grpo_loss(
    logprobs_N: Tensor,
    sampled_N: Tensor,
    advantages_N: Tensor,
    token_weights_N: Tensor,
    bounds: RatioBounds,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """-sum of token_weight * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / mu; a bound of 0 does not clip.

    Tokens whose ratio leaves the bounds count as 0; those with a cap have at most that ratio.
    Source: DeepSeekMath (GRPO), with the two-sided mask of the MiMo-V2-Flash report, equation 8.
    """
    ratio_N = torch.exp(logprobs_N - sampled_N)
    kept_N = masked_ratios(logprobs_N, sampled_N, bounds).kept_N
    if bounds.caps_N is not None:
        # A truncated ratio still passes its gradient on, as a constant weight of grad log pi.
        factor_N = (torch.minimum(ratio_N, bounds.caps_N) / ratio_N).detach()
        ratio_N = ratio_N * factor_N
    low = 1 - clip_low if clip_low else 0.0
    high = 1 + clip_high if clip_high else float("inf")
    gain_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(low, high) * advantages_N)
    return -(token_weights_N * torch.where(kept_N, gain_N, torch.zeros_like(gain_N))).sum()
