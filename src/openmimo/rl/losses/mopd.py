"""Multi-teacher on-policy distillation: equations 5-9 of the MiMo-V2-Flash report.

Suffixes: N answer tokens, V vocabulary, K the teacher's most probable tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmimo.rl.losses.ratios import RatioBounds, masked_ratios


def mopd_loss(
    logprobs_N: Tensor,
    sampled_N: Tensor,
    teacher_N: Tensor,
    outcome_N: Tensor,
    token_weights_N: Tensor,
    bounds: RatioBounds,
    *,
    outcome_weight: float,
    teacher_weight: float = 1.0,
) -> Tensor:
    """-sum of token_weight * w * A * log pi with w of equation 8 and A = sg[log teacher - log pi] + alpha * outcome.

    `teacher_N` is the log-probability that the token's teacher gives it, `outcome_N` the normalised outcome advantage
    of the token's answer; the teacher's part is never normalised. alpha is `outcome_weight`.
    """
    weights_N = masked_ratios(logprobs_N, sampled_N, bounds).weights_N
    advantage_N = teacher_weight * (teacher_N - logprobs_N.detach()) + outcome_weight * outcome_N
    return -(token_weights_N * weights_N * advantage_N * logprobs_N).sum()


def divergence_loss(
    divergence_N: Tensor,
    logprobs_N: Tensor,
    sampled_N: Tensor,
    outcome_N: Tensor,
    token_weights_N: Tensor,
    bounds: RatioBounds,
    *,
    outcome_weight: float,
    teacher_weight: float = 1.0,
) -> Tensor:
    """The same with a divergence over the vocabulary, differentiated itself, in the place of the sampled token's part.

    Tokens that the mask of equation 8 leaves out count in neither part.
    """
    weights = masked_ratios(logprobs_N, sampled_N, bounds)
    outcome = weights.weights_N * outcome_weight * outcome_N * logprobs_N
    return (token_weights_N * (weights.kept_N * teacher_weight * divergence_N - outcome)).sum()


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(student || teacher) of each token, from log-probabilities over the whole vocabulary."""
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)


def reverse_kl_top_k(student_NV: Tensor, teacher_NK: Tensor, ids_NK: Tensor) -> Tensor:
    """KL(student || teacher) when all tokens but `ids_NK` are one: never negative, at most the exact divergence.

    `teacher_NK` are the teacher's log-probabilities of those tokens. The bucket of the others is what they leave of 1.
    """
    student_NK = student_NV.gather(1, ids_NK)
    # What is left is summed over the other tokens, not taken from 1, which would cancel where it is small.
    others_NV = student_NV.scatter(1, ids_NK, float("-inf"))
    student_rest_N = others_NV.logsumexp(-1)
    teacher_rest_N = log_rest(teacher_NK)
    rest_N = _term(student_rest_N, teacher_rest_N)
    rest_N = torch.where(student_rest_N.isneginf(), teacher_rest_N.exp(), rest_N)
    return _term(student_NK, teacher_NK).sum(-1) + rest_N


def _term(student: Tensor, teacher: Tensor) -> Tensor:
    """p log(p / q) - p + q, which is not negative; over all outcomes -p + q adds up to 0."""
    return student.exp() * (student - teacher) - student.exp() + teacher.exp()


def log_rest(logprobs_NK: Tensor) -> Tensor:
    """log(1 - sum of probabilities), at least that of the smallest fp32 step below 1."""
    return (1.0 - logprobs_NK.exp().sum(-1, dtype=torch.float64)).clamp(min=2.0**-30).log().to(logprobs_NK.dtype)
