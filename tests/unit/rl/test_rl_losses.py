"""The objectives against loops written from the equations in float64, and their gradients against differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openmimo.rl.losses.grpo import grpo_loss
from openmimo.rl.losses.mopd import divergence_loss, mopd_loss, reverse_kl, reverse_kl_top_k
from openmimo.rl.losses.ratios import RatioBounds, group_advantages, masked_ratios, token_weights

LENGTHS = (3, 1, 5, 2)
BOUNDS = RatioBounds(0.5, 2.0)
Case = dict[str, Tensor]


def make_case(seed: int) -> Case:
    """Four answers of different lengths; some ratios outside of the bounds on either side."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sampled = -normal(size).abs() - 0.1
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    return {
        "logprobs": sampled + 0.7 * normal(size),
        "sampled": sampled,
        "teacher": sampled + normal(size),
        "advantages": normal(len(LENGTHS))[sequence],
        "weights": token_weights(lengths, sequence, torch.full((len(LENGTHS),), 0.25, dtype=torch.float64)),
        "sequence": sequence,
    }


def by_answer(case: Case, term: Callable[[int], float]) -> float:
    """-1/S sum over answers of 1/|y| sum over tokens of `term`: equation 7's means, token by token."""
    total, place = 0.0, 0
    for length in LENGTHS:
        total += sum(term(place + t) for t in range(length)) / length
        place += length
    return -total / len(LENGTHS)


def check_gradient(loss: Callable[[Tensor], Tensor], at: Tensor, wanted: Callable[[int], float] | None = None) -> None:
    """The gradient against central differences, or against what `wanted` says for entry i."""
    variable = at.clone().requires_grad_()
    loss(variable).backward()
    assert variable.grad is not None
    for i in range(at.numel()):
        if wanted is None:
            step = 1e-6
            up, down = at.clone(), at.clone()
            up.view(-1)[i] += step
            down.view(-1)[i] -= step
            expected = float(loss(up) - loss(down)) / (2 * step)
        else:
            expected = wanted(i)
        assert float(variable.grad.view(-1)[i]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_mopd_is_equations_7_to_9(seed: int, alpha: float) -> None:
    """Would catch another mean, a mask with one side, or a gradient that runs through w or A."""
    case = make_case(seed)

    def pieces(i: int) -> tuple[float, float]:
        log_pi, log_mu = float(case["logprobs"][i]), float(case["sampled"][i])
        ratio = math.exp(log_pi - log_mu)
        weight = ratio if 0.5 <= ratio <= 2.0 else 0.0
        advantage = float(case["teacher"][i]) - log_pi + alpha * float(case["advantages"][i])
        return weight * advantage, log_pi

    def loss(logprobs: Tensor) -> Tensor:
        rest = (case["sampled"], case["teacher"], case["advantages"], case["weights"])
        return mopd_loss(logprobs, *rest, BOUNDS, outcome_weight=alpha)

    got = float(loss(case["logprobs"]))
    assert got == pytest.approx(by_answer(case, lambda i: pieces(i)[0] * pieces(i)[1]), rel=1e-6)
    # w and A are constants to the derivative, so differences of the whole would be wrong here.
    check_gradient(loss, case["logprobs"], lambda i: -float(case["weights"][i]) * pieces(i)[0])
    assert any(pieces(i)[0] == 0.0 for i in range(sum(LENGTHS)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("clip_low", "clip_high"), [(0.2, 0.28), (0.0, 0.0)])
def test_grpo_is_the_clipped_objective(seed: int, clip_low: float, clip_high: float) -> None:
    """Would catch a clip on the wrong side, and masked tokens that still count."""
    case = make_case(seed)

    def term(i: int) -> float:
        ratio = math.exp(float(case["logprobs"][i]) - float(case["sampled"][i]))
        if not 0.5 <= ratio <= 2.0:
            return 0.0
        advantage = float(case["advantages"][i])
        low, high = (1 - clip_low, 1 + clip_high) if clip_low else (0.0, math.inf)
        return min(ratio * advantage, min(max(ratio, low), high) * advantage)

    def loss(logprobs: Tensor) -> Tensor:
        rest = (case["sampled"], case["advantages"], case["weights"])
        return grpo_loss(logprobs, *rest, BOUNDS, clip_low=clip_low, clip_high=clip_high)

    assert float(loss(case["logprobs"])) == pytest.approx(by_answer(case, term), rel=1e-6)
    check_gradient(loss, case["logprobs"])


def test_masked_tokens_have_no_gradient_and_bounds_count() -> None:
    """Equation 8 keeps both bounds and nothing beyond them, on either side."""
    sampled = torch.zeros(6, dtype=torch.float64)
    ratios = torch.tensor([0.5, 0.5 - 1e-9, 2.0, 2.0 + 1e-9, 1.0, 0.0], dtype=torch.float64)
    weights = masked_ratios(ratios.log(), sampled, RatioBounds(0.5, 2.0))
    assert weights.kept_N.tolist() == [True, False, True, False, True, False]
    assert weights.weights_N.tolist() == pytest.approx([0.5, 0.0, 2.0, 0.0, 1.0, 0.0])


def test_caps_truncate_stale_tokens_alone() -> None:
    """Truncated importance sampling: a token of older weights counts at most its cap, a fresh one its ratio."""
    sampled = torch.zeros(3, dtype=torch.float64)
    ratios = torch.tensor([1.5, 1.5, 0.8], dtype=torch.float64)
    caps = torch.tensor([math.inf, 1.0, 1.0], dtype=torch.float64)
    bounds = RatioBounds(0.5, 2.0, caps)
    assert masked_ratios(ratios.log(), sampled, bounds).weights_N.tolist() == pytest.approx([1.5, 1.0, 0.8])
    logprobs = ratios.log().requires_grad_()
    ones = torch.ones(3, dtype=torch.float64)
    grpo_loss(logprobs, sampled, ones, ones, bounds, clip_low=0.0, clip_high=0.0).backward()
    assert logprobs.grad is not None
    assert (-logprobs.grad).tolist() == pytest.approx([1.5, 1.0, 0.8])


def test_group_advantages() -> None:
    """Mean 0, deviation 1 per group; equal rewards give exactly 0, not noise over a tiny deviation."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    got = group_advantages(rewards)
    assert got[0].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert got[1].tolist() == [0.0] * 4
    assert float(got[2].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(got[2].square().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_teachers_part_does_not_depend_on_the_rewards_scale(scale: float) -> None:
    """Normalising the sum would let large rewards push the teacher away; only the outcome part is normalised."""
    case = make_case(3)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64) * scale
    outcome = group_advantages(rewards).flatten()[case["sequence"]]
    one = mopd_loss(
        case["logprobs"], case["sampled"], case["teacher"], outcome, case["weights"], BOUNDS, outcome_weight=0.1
    )
    reference = group_advantages(rewards / scale).flatten()[case["sequence"]]
    other = mopd_loss(
        case["logprobs"], case["sampled"], case["teacher"], reference, case["weights"], BOUNDS, outcome_weight=0.1
    )
    assert float(one) == pytest.approx(float(other), rel=1e-9)


def distributions(seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 11, generator=generator, dtype=torch.float64) * spread
    return logits[0].log_softmax(-1), logits[1].log_softmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_full_divergence_is_the_reverse_kl(seed: int) -> None:
    """Would catch the forward divergence, which swaps the roles."""
    student, teacher = distributions(seed)
    got = reverse_kl(student, teacher)
    for row in range(len(student)):
        p = [math.exp(float(x)) for x in student[row]]
        q = [math.exp(float(x)) for x in teacher[row]]
        assert float(got[row]) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-6)
    check_gradient(lambda logits: reverse_kl(logits.view(4, 11).log_softmax(-1), teacher).sum(), student.flatten())


@pytest.mark.parametrize("k", [1, 3, 10, 11])
@pytest.mark.parametrize("seed", range(3))
def test_top_k_divergence_is_exact_on_its_buckets(seed: int, k: int) -> None:
    """Never negative, at most the exact divergence, and equal to the divergence of the k + 1 merged outcomes."""
    student, teacher = distributions(seed)
    best = teacher.topk(k, -1)
    got = reverse_kl_top_k(student, best.values, best.indices)
    assert bool((got >= -1e-12).all())
    assert bool((got <= reverse_kl(student, teacher) + 1e-9).all())
    for row in range(len(student)):
        inside = best.indices[row].tolist()
        p = [math.exp(float(student[row, i])) for i in inside]
        q = [math.exp(float(teacher[row, i])) for i in inside]
        if k < 11:
            p.append(1 - sum(p))
            q.append(1 - sum(q))
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert float(got[row]) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    check_gradient(
        lambda logits: reverse_kl_top_k(logits.view(4, 11).log_softmax(-1), best.values, best.indices).sum(),
        student.flatten(),
    )


def test_top_k_divergence_of_equal_distributions_is_zero_in_fp32() -> None:
    """A truncated sum goes below 0 here, and clamping it would take the gradient away."""
    student = distributions(0, spread=6.0)[0].float()
    best = student.topk(3, -1)
    got = reverse_kl_top_k(student, best.values, best.indices)
    assert bool((got.abs() < 1e-6).all())


def test_the_sampled_signal_is_the_full_one_on_average() -> None:
    """E over tokens of A grad log pi is -grad KL: the one-token estimate must not be biased."""
    student, teacher = distributions(7)
    logits = student.clone().requires_grad_()
    reverse_kl(logits.log_softmax(-1), teacher).sum().backward()
    exact = logits.grad
    logits = student.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    # Every token of every row, weighted by its probability, stands for infinitely many samples.
    flat = logprobs.flatten()
    loss = mopd_loss(
        flat, flat.detach(), teacher.flatten(), torch.zeros_like(flat), flat.detach().exp(), BOUNDS, outcome_weight=0.0
    )
    loss.backward()
    assert exact is not None
    assert logits.grad is not None
    assert torch.allclose(logits.grad, exact, rtol=1e-6, atol=1e-9)


def test_divergence_loss_masks_both_parts() -> None:
    """A token outside of the bounds gives neither divergence nor outcome."""
    sampled = torch.zeros(2, dtype=torch.float64)
    logprobs = torch.tensor([0.1, 5.0], dtype=torch.float64, requires_grad=True)
    divergence = torch.tensor([0.3, 9.0], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(2, dtype=torch.float64)
    loss = divergence_loss(divergence, logprobs, sampled, ones, ones, BOUNDS, outcome_weight=0.5)
    assert float(loss.detach()) == pytest.approx(0.3 - math.exp(0.1) * 0.5 * 0.1)
    loss.backward()
    assert divergence.grad is not None
    assert logprobs.grad is not None
    assert divergence.grad.tolist() == [1.0, 0.0]
    assert float(logprobs.grad[1]) == 0.0
