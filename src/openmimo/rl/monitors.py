"""What is watched while a policy learns: how far trainer and sampler are apart, and what replay repairs.

Suffixes: N answer tokens, B rows, T tokens of a row, L sparse layers, k chosen experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openmimo.model import MiMoModel
from openmimo.rl.batching import MicroBatch
from openmimo.rl.logprobs import token_logprobs

# A ratio beyond this, or below its inverse, is extreme. Source: the R3 paper's F(2).
EXTREME_RATIO = 2.0


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Trainer against sampler, over the tokens of a step.

    `kl` estimates KL(sampler || trainer) in nats per token; `extreme` is the share of tokens whose probability ratio
    leaves [1/2, 2]; `worst` the greatest difference of log-probabilities. `routes` is the share of router decisions,
    one per token and layer, whose set of experts differs from the sampler's; None where routes were not recorded.
    """

    kl: float
    extreme: float
    worst: float
    num_tokens: int
    routes: float | None = None


def mismatch(logprobs_N: Tensor, sampled_N: Tensor, routes: float | None = None) -> Mismatch:
    """From both log-probabilities of the sampled tokens. The KL estimate is r - 1 - log r, which is never negative."""
    gap_N = (logprobs_N - sampled_N).double()
    limit = math.log(EXTREME_RATIO)
    return Mismatch(
        kl=float((gap_N.exp() - 1 - gap_N).mean()),
        extreme=float((gap_N.abs() > limit).double().mean()),
        worst=float(gap_N.abs().max()),
        num_tokens=len(gap_N),
        routes=routes,
    )


def route_difference(chosen_BTLk: Tensor, batch: MicroBatch) -> float | None:
    """The share of (token, layer) pairs whose experts are another set than the recorded ones."""
    if batch.routes_BTLk is None or not bool(batch.has_routes_BT.any()):
        return None
    mine = chosen_BTLk[batch.has_routes_BT].long().sort(-1).values
    theirs = batch.routes_BTLk[batch.has_routes_BT].sort(-1).values
    return float((mine != theirs).any(-1).double().mean())


@torch.no_grad()
def native_mismatch(model: MiMoModel, batch: MicroBatch, max_tokens: int, num_tokens: int) -> Mismatch:
    """The mismatch when the trainer's own routers choose: what there would be without replay.

    Looks at the first rows that hold about `max_tokens` places; `num_tokens` ids can be chosen.
    Cost: one forward pass over those rows.
    """
    num_rows = max(1, max_tokens // batch.token_ids_BT.shape[1])
    rows = slice(0, num_rows)
    output = model(batch.token_ids_BT[rows], **batch.places(rows))
    inside_N = batch.rows_N < output.token_ids_BT.numel()
    hidden_ND = model.norm(output.hidden_BTD.flatten(0, 1)[batch.rows_N[inside_N]])
    logprobs_N = token_logprobs(
        hidden_ND, model.lm_head.weight[:num_tokens], batch.targets_N[inside_N], batch.temperature_N[inside_N]
    ).logprobs_N
    routes = None
    if output.routing and batch.routes_BTLk is not None:
        has = batch.has_routes_BT[rows]
        mine = output.routed_experts[has].long().sort(-1).values
        theirs = batch.routes_BTLk[rows][has].sort(-1).values
        routes = float((mine != theirs).any(-1).double().mean())
    return mismatch(logprobs_N, batch.sampled_logprobs_N[inside_N], routes)


class TrendAlert:
    """Says when a figure has moved by more than `factor` from its mean over the first `window` steps.

    For num-zeros: a rise means that the balance of experts gets worse, a fall that the model over-fits.
    """

    def __init__(self, *, window: int = 10, factor: float = 1.5) -> None:
        self.window, self.factor = window, factor
        self._first: list[float] = []
        self._recent: list[float] = []

    def observe(self, value: float) -> str | None:
        """ "rising", "falling" or None, from the mean of the last `window` values."""
        if len(self._first) < self.window:
            self._first.append(value)
            return None
        self._recent = [*self._recent[-(self.window - 1) :], value]
        if len(self._recent) < self.window:
            return None
        before, now = sum(self._first) / self.window, sum(self._recent) / self.window
        if now > self.factor * max(before, 1.0):
            return "rising"
        return "falling" if now * self.factor < before else None
