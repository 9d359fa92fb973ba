"""One update of the policy from a step's answers: forward with replayed experts, loss, backward, optimiser.

Suffixes as in `batching`; D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openmimo.config.model import AttentionKind
from openmimo.config.rl import Algorithm, PolicyLossRecipe, RolloutRecipe, Signal
from openmimo.errors import TrainingError
from openmimo.model import MiMoModel
from openmimo.model.attention import AttentionPlan
from openmimo.model.model import ModelOutput
from openmimo.model.moe import update_balance_bias
from openmimo.rl.batching import MicroBatch
from openmimo.rl.logprobs import TokenLogProbs, exact_logprobs, scaled_logits, token_logprobs
from openmimo.rl.losses.grpo import grpo_loss
from openmimo.rl.losses.mopd import divergence_loss, mopd_loss, reverse_kl, reverse_kl_top_k
from openmimo.rl.losses.ratios import RatioBounds, masked_ratios, token_weights
from openmimo.rl.monitors import Mismatch, mismatch, route_difference
from openmimo.rl.teachers import TeacherView
from openmimo.train.losses import linear_cross_entropy
from openmimo.train.optimizer import MasterAdamW


@dataclass(frozen=True, kw_only=True)
class AnswerTargets:
    """What the loss knows of each answer S of an update: tokens, share of the loss, and outcome advantage."""

    lengths_S: Tensor
    share_S: Tensor
    advantages_S: Tensor


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """`masked` is the share of tokens that equation 8 left out; `entropy` in nats; `mtp_loss` the heads' mean."""

    loss: float
    grad_norm: float
    applied: bool
    mismatch: Mismatch
    masked: float
    entropy: float
    mtp_loss: float
    num_tokens: int


class PolicyUpdater:
    """Accumulates the gradients of micro-batches, in fp32 where there are several, and steps.

    `num_tokens` is how many rows of the vocabulary the sampler chooses from.
    """

    def __init__(
        self,
        model: MiMoModel,
        optimizer: MasterAdamW,
        recipe: PolicyLossRecipe,
        algorithm: Algorithm,
        *,
        rollout: RolloutRecipe,
        num_tokens: int,
    ) -> None:
        self.model, self.optimizer, self.recipe = model, optimizer, recipe
        self.algorithm, self.rollout, self.num_tokens = algorithm, rollout, num_tokens
        self._sums: dict[int, Tensor] = {}
        self._parts: list[_Part] = []
        self._load_LE: Tensor | None = None

    def begin(self) -> None:
        """Forget the last update's gradients."""
        self.optimizer.zero_grad()
        self._sums, self._parts, self._load_LE = {}, [], None

    def add(
        self, batch: MicroBatch, answers: AnswerTargets, *, version: int, teacher: TeacherView | None = None
    ) -> float:
        """Add a micro-batch's gradients. `version` is that of the sampler's weights now.

        Returns log policy - log teacher summed over the tokens, 0 without a teacher.
        Raises: TrainingError if experts are to be replayed and a token has none recorded.
        """
        if self.rollout.replay and batch.num_unrouted:
            raise TrainingError(
                f"{batch.num_unrouted} tokens have no recorded experts, so they cannot be replayed; "
                "sample with routed_experts=True, or switch rollout.replay off"
            )
        output = self.model(
            batch.token_ids_BT,
            **batch.places(),
            routed_experts_BTLk=batch.routes_BTLk if self.rollout.replay and self.model.config.num_moe_layers else None,
        )
        hidden_ND = self.model.norm(output.hidden_BTD.flatten(0, 1)[batch.rows_N])
        logprobs_N, entropy_N = self._logprobs(hidden_ND, batch)
        loss = self._policy_loss(batch, answers, version, teacher, hidden_ND, logprobs_N)
        mtp = mtp_loss(output, batch) if self.recipe.mtp_weight and self.model.config.num_mtp_heads else None
        total = loss
        if mtp is not None:
            mtp = mtp / answers.lengths_S.sum()
            total = loss + self.recipe.mtp_weight * mtp
        total.backward()
        self._collect()
        gap = 0.0 if teacher is None else float((logprobs_N.detach() - teacher.logprobs_N).sum())
        self._note(batch, output, logprobs_N.detach(), entropy_N, float(loss.detach()), mtp)
        return gap

    def step(self, learning_rate: float, bias_update_rate: float = 0.0) -> UpdateStats:
        """Update the weights from what was added. Gradients stay on the parameters for the monitors."""
        for parameter in self.model.parameters():
            total = self._sums.get(id(parameter))
            if total is not None:
                parameter.grad = total.to(parameter.dtype)
        self._sums = {}
        grad_norm = self.optimizer.step(learning_rate)
        applied = math.isfinite(grad_norm)
        if applied and bias_update_rate and self._load_LE is not None:
            for router, load_E in zip(self.model.routers(), self._load_LE, strict=True):
                update_balance_bias(router, load_E, bias_update_rate)
        return _stats(self._parts, grad_norm, applied)

    def _logprobs(self, hidden_ND: Tensor, batch: MicroBatch) -> TokenLogProbs:
        if self.rollout.exact:
            logits_NV = self.model.lm_head(hidden_ND)[:, : self.num_tokens]
            numbers = (batch.targets_N, batch.temperature_N, batch.sequence_N)
            return exact_logprobs(logits_NV, *numbers, top_p=self.rollout.top_p)
        weight_VD = self.model.lm_head.weight[: self.num_tokens]
        return token_logprobs(hidden_ND, weight_VD, batch.targets_N, batch.temperature_N)

    def _policy_loss(
        self,
        batch: MicroBatch,
        answers: AnswerTargets,
        version: int,
        teacher: TeacherView | None,
        hidden_ND: Tensor,
        logprobs_N: Tensor,
    ) -> Tensor:
        r = self.recipe
        weights_N = token_weights(answers.lengths_S, batch.sequence_N, answers.share_S)
        outcome_N = answers.advantages_S[batch.sequence_N]
        caps_N = None
        if bool((batch.versions_N < version).any()):
            fresh = torch.full_like(weights_N, math.inf)
            caps_N = torch.where(batch.versions_N < version, torch.full_like(weights_N, r.stale_ratio_cap), fresh)
        bounds = RatioBounds(r.ratio_low, r.ratio_high, caps_N)
        sampled_N = batch.sampled_logprobs_N
        if self.algorithm is Algorithm.GRPO:
            clips = {"clip_low": r.clip_low, "clip_high": r.clip_high}
            return grpo_loss(logprobs_N, sampled_N, outcome_N, weights_N, bounds, **clips)
        if teacher is None:
            raise TrainingError("MOPD needs what a teacher says about the answers; pass its view")
        parts = {"outcome_weight": r.outcome_weight, "teacher_weight": r.teacher_weight}
        if r.signal is Signal.SAMPLED:
            return mopd_loss(logprobs_N, sampled_N, teacher.logprobs_N, outcome_N, weights_N, bounds, **parts)
        student_NV = scaled_logits(
            hidden_ND, self.model.lm_head.weight[: self.num_tokens], batch.temperature_N
        ).log_softmax(-1)
        if teacher.full_NV is not None:
            divergence_N = reverse_kl(student_NV, teacher.full_NV)
        else:
            assert teacher.top_NK is not None
            assert teacher.ids_NK is not None
            divergence_N = reverse_kl_top_k(student_NV, teacher.top_NK, teacher.ids_NK)
        return divergence_loss(divergence_N, logprobs_N, sampled_N, outcome_N, weights_N, bounds, **parts)

    def _collect(self) -> None:
        """Move gradients of bf16 parameters into fp32 sums: added up in bf16, small parts would be lost."""
        for parameter in self.model.parameters():
            if parameter.grad is None or parameter.dtype is torch.float32:
                continue
            known = self._sums.get(id(parameter))
            if known is None:
                self._sums[id(parameter)] = parameter.grad.float()
            else:
                known += parameter.grad
            parameter.grad = None

    def _note(
        self,
        batch: MicroBatch,
        output: ModelOutput,
        logprobs_N: Tensor,
        entropy_N: Tensor,
        loss: float,
        mtp: Tensor | None,
    ) -> None:
        bounds = RatioBounds(self.recipe.ratio_low, self.recipe.ratio_high)
        kept_N = masked_ratios(logprobs_N, batch.sampled_logprobs_N, bounds).kept_N
        routes = None
        if output.routing:
            chosen_BTLk = output.routed_experts
            routes = route_difference(chosen_BTLk, batch)
            self._count_load(chosen_BTLk, batch)
        self._parts.append(
            _Part(
                loss=loss,
                logprobs_N=logprobs_N,
                sampled_N=batch.sampled_logprobs_N,
                masked=float((~kept_N).float().sum()),
                entropy=float(entropy_N.sum()),
                mtp=0.0 if mtp is None else float(mtp.detach()),
                routes=routes,
            )
        )

    def _count_load(self, chosen_BTLk: Tensor, batch: MicroBatch) -> None:
        """Tokens per expert, without padding."""
        assert self.model.config.moe is not None
        inside_NLk = chosen_BTLk[batch.document_ids_BT >= 0].long()
        one = F.one_hot(inside_NLk, self.model.config.moe.num_experts).sum((0, 2))
        self._load_LE = one if self._load_LE is None else self._load_LE + one


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Sums over one micro-batch."""

    loss: float
    logprobs_N: Tensor
    sampled_N: Tensor
    masked: float
    entropy: float
    mtp: float
    routes: float | None


def _stats(parts: Sequence[_Part], grad_norm: float, applied: bool) -> UpdateStats:
    logprobs_N = torch.cat([part.logprobs_N for part in parts])
    sampled_N = torch.cat([part.sampled_N for part in parts])
    size = len(logprobs_N)
    known = [part.routes for part in parts if part.routes is not None]
    return UpdateStats(
        loss=sum(part.loss for part in parts),
        grad_norm=grad_norm,
        applied=applied,
        mismatch=mismatch(logprobs_N, sampled_N, sum(known) / len(known) if known else None),
        masked=sum(part.masked for part in parts) / size,
        entropy=sum(part.entropy for part in parts) / size,
        mtp_loss=sum(part.mtp for part in parts),
        num_tokens=size,
    )


def mtp_loss(output: ModelOutput, batch: MicroBatch) -> Tensor:
    """Cross-entropy of the MTP heads, summed over the answers' tokens, mean over the heads; it reaches them alone.

    Hidden states, embedding and output head are detached, so drafting follows the policy without pulling at it. Head k
    at position i sees token i + 1 + k and predicts token i + 2 + k. Answers that share a prompt keep its end for
    themselves (`pack`), so that what a head sees is of the answer that it predicts.
    """
    model = output.model
    plan: AttentionPlan = output.plans[AttentionKind.SLIDING]
    weight_VD = model.lm_head.weight.detach()
    is_target_BT = torch.zeros_like(batch.has_routes_BT)
    is_target_BT.view(-1)[batch.rows_N] = True
    losses: list[Tensor] = []
    for index, head in enumerate(model.mtp_heads):
        shift = index + 1
        next_ids_BT = F.pad(batch.token_ids_BT[:, shift:], (0, shift))
        embedded_BTD = model.embed_tokens(next_ids_BT).detach()
        hidden_BTD = head(output.hidden_BTD.detach(), embedded_BTD, plan)
        same_BT = batch.document_ids_BT[:, shift:] == batch.document_ids_BT[:, :-shift]
        wanted_BT = F.pad(is_target_BT[:, shift:] & same_BT, (0, shift))
        rows_N = wanted_BT.flatten().nonzero()[:, 0]
        targets_N = batch.next_ids_BT.flatten()[(rows_N + shift).clamp(max=batch.next_ids_BT.numel() - 1)]
        mean = linear_cross_entropy(hidden_BTD.flatten(0, 1)[rows_N], weight_VD, targets_N)
        losses.append(mean * len(rows_N))
    return torch.stack(losses).mean()
