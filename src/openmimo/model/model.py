"""The whole model: embedding, hybrid layers, output head and MTP heads.

Suffixes: B batch, T tokens, D hidden, V vocabulary, L sparse layers, k chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.errors import ShapeError
from openmimo.model.attention import AttentionPlan, make_cached_plans, make_plans
from openmimo.model.block import Block, RMSNorm
from openmimo.model.cache import Cache
from openmimo.model.linear import HasInvariantForm, Linear
from openmimo.model.moe import LayerRouting, Router
from openmimo.model.mtp import MTPHead


@dataclass(frozen=True)
class ModelOutput:
    """One forward pass. `hidden_BTD` is the last layer's output before the final norm.

    `routing` has one entry per sparse layer, in layer order. Logits are computed when asked for.
    """

    model: MiMoModel = field(repr=False)
    token_ids_BT: Tensor
    hidden_BTD: Tensor
    routing: tuple[LayerRouting, ...]
    plans: dict[AttentionKind, AttentionPlan] = field(repr=False)

    @property
    def logits(self) -> Tensor:
        """Next-token logits, shape (B, T, V)."""
        return self.model.lm_head(self.model.norm(self.hidden_BTD))

    def mtp_hidden(self, head: int) -> Tensor:
        """Head `head` over the whole sequence, ready for `lm_head`; the last head + 1 positions see padding."""
        plan = self.plans[AttentionKind.SLIDING]
        if plan.cached:
            raise ShapeError("this output comes from a step on a cache; call model.mtp_forward with the cache instead")
        shifted_BT = F.pad(self.token_ids_BT[:, head + 1 :], (0, min(head + 1, self.token_ids_BT.shape[1])))
        return self.model.mtp_forward(head, self.hidden_BTD, shifted_BT, plan)

    def mtp_logits(self, head: int) -> Tensor:
        """Logits of MTP head `head` (0-based): position i predicts token i + 2 + head. Shape (B, T, V)."""
        return self.model.lm_head(self.mtp_hidden(head))

    @property
    def routed_experts(self) -> Tensor:
        """Chosen experts, shape (B, T, L, k), uint8 up to 256 experts, else uint16."""
        moe = self.model.config.moe
        if not self.routing or moe is None:
            raise ShapeError("this model has no sparse layers, so no routed experts")
        dtype = torch.uint8 if moe.num_experts <= 256 else torch.uint16
        return torch.stack([layer.experts_BTk for layer in self.routing], dim=2).to(dtype)


class MiMoModel(HasInvariantForm, nn.Module):
    """MiMo-V2-Flash on one device. Parameters keep Hub names, with q/k/v, gate/up and experts stacked.

    With `recompute`, a layer or head keeps only its input for the backward pass, which runs its forward pass again.
    """

    recompute: bool = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.mtp_heads = nn.ModuleList(MTPHead(config) for _ in range(config.num_mtp_heads))

    def forward(
        self,
        input_ids_BT: Tensor,
        *,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        branch_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        routed_experts_BTLk: Tensor | None = None,
    ) -> ModelOutput:
        """Run all layers.

        `document_ids_BT` keeps packed documents apart (-1 on padding). `branch_ids_BT` lets several texts share their
        beginning, which is then computed once: a document starts with branch 0, and each of the other branches, one
        behind the other, goes on from its end; `position_ids_BT` must say so. With a cache the tokens are appended to
        it: the caller commits them afterwards. `routed_experts_BTLk` replays given experts in every sparse layer.
        Raises: ShapeError on inputs that do not fit.
        """
        self._check(input_ids_BT, position_ids_BT, document_ids_BT, cache, routed_experts_BTLk)
        self._check_branches(position_ids_BT, document_ids_BT, branch_ids_BT)
        plans, position_ids_BT = self._plans(input_ids_BT, position_ids_BT, document_ids_BT, branch_ids_BT, cache)
        x_BTD = self.embed_tokens(input_ids_BT)
        routing: list[LayerRouting] = []
        for index, layer in enumerate(self.layers):
            sparse = self.config.layer_is_moe[index]
            replay = routed_experts_BTLk[:, :, len(routing)] if sparse and routed_experts_BTLk is not None else None
            layer_cache = None if cache is None else cache.layers[index]
            plan = plans[self.config.layer_kinds[index]]
            x_BTD, decided = self._run(layer, x_BTD, plan, layer_cache, replay)
            if decided is not None:
                routing.append(decided)
        return ModelOutput(self, input_ids_BT, x_BTD, tuple(routing), plans)

    def mtp_forward(
        self, head: int, hidden_BTD: Tensor, next_ids_BT: Tensor, plan: AttentionPlan, cache: Cache | None = None
    ) -> Tensor:
        """MTP head `head` on hidden states h_i and the tokens i + 1 + head. Shapes: -> (B, T, D) for `lm_head`."""
        layer_cache = None if cache is None else cache.mtp_heads[head]
        return self._run(self.mtp_heads[head], hidden_BTD, self.embed_tokens(next_ids_BT), plan, layer_cache)

    def set_invariant(self, invariant: bool = True) -> MiMoModel:
        """Choose whether a token's bits depend on its context alone, not on batch, packing, chunks, caches or drafts.

        Then a training pass and a sampler give the same logits, routes and MTP logits, bit for bit. In fp32 only, and
        slower (`kernels.invariant`). Gradients stay right and are not invariant. Packed rows need position ids that
        restart with every document. Returns the model.
        """
        for module in self.modules():
            if isinstance(module, HasInvariantForm):
                module.invariant = invariant
        return self

    def routers(self) -> list[Router]:
        """The routers in layer order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _run(self, layer: nn.Module, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing draws numbers
        return layer(*inputs)

    def _plans(
        self,
        ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        branch_ids_BT: Tensor | None,
        cache: Cache | None,
    ) -> tuple[dict[AttentionKind, AttentionPlan], Tensor]:
        dtype = self.embed_tokens.weight.dtype
        if cache is not None:
            starts_empty = cache.is_empty
            position_ids_BT = cache.begin_step(ids_BT.shape[1])
            if not starts_empty:
                plans = make_cached_plans(self.config, position_ids_BT, cache, dtype, is_invariant=self.invariant)
                return plans, position_ids_BT
        if position_ids_BT is None:
            position_ids_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        plans = make_plans(
            self.config,
            position_ids_BT,
            document_ids_BT,
            dtype,
            branch_ids_BT=branch_ids_BT,
            writes_cache=cache is not None,
            is_invariant=self.invariant,
        )
        return plans, position_ids_BT

    def _check_branches(
        self, position_ids_BT: Tensor | None, document_ids_BT: Tensor | None, branch_ids_BT: Tensor | None
    ) -> None:
        if branch_ids_BT is None:
            return
        if self.invariant:
            raise ShapeError("an invariant pass has no branches; give every text a document of its own")
        if position_ids_BT is None or document_ids_BT is None or branch_ids_BT.shape != document_ids_BT.shape:
            raise ShapeError(
                f"branch_ids {tuple(branch_ids_BT.shape)} need position_ids and document_ids of the same shape"
            )

    def _check(
        self,
        ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        document_ids_BT: Tensor | None,
        cache: Cache | None,
        replay_BTLk: Tensor | None,
    ) -> None:
        if ids_BT.ndim != 2 or ids_BT.shape[1] == 0:
            raise ShapeError(
                f"input_ids has shape {tuple(ids_BT.shape)}; expected (batch, tokens) with at least one token"
            )
        if document_ids_BT is not None and document_ids_BT.shape != ids_BT.shape:
            raise ShapeError(
                f"document_ids {tuple(document_ids_BT.shape)} must have the shape of input_ids {tuple(ids_BT.shape)}"
            )
        if position_ids_BT is not None and (cache is not None or position_ids_BT.shape != ids_BT.shape):
            raise ShapeError(
                f"position_ids has shape {tuple(position_ids_BT.shape)}; expected {tuple(ids_BT.shape)}, "
                "and none with a cache, which counts positions itself"
            )
        if cache is not None and (document_ids_BT is not None or cache.batch_size != ids_BT.shape[0]):
            raise ShapeError(
                f"a cache for {cache.batch_size} unpacked sequences cannot take this batch of {ids_BT.shape[0]}"
            )
        if replay_BTLk is not None:
            moe = self.config.moe
            expected = (*ids_BT.shape, self.config.num_moe_layers, moe.num_experts_per_token if moe else 0)
            if tuple(replay_BTLk.shape) != expected:
                raise ShapeError(f"routed_experts has shape {tuple(replay_BTLk.shape)}; expected {expected}")


def build_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> MiMoModel:
    """A model with random weights: normal with `init_std`, norms 1, sinks and router bias 0; routers stay fp32."""
    model = MiMoModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, config.init_std, generator=generator)
            elif not name.endswith("sink_bias"):
                parameter.fill_(1.0)
    return cast_model(model, dtype)


def cast_model(model: MiMoModel, dtype: torch.dtype) -> MiMoModel:
    """Change the dtype of all weights but the routers', which keep every bit of their fp32."""
    for module in model.modules():
        if not isinstance(module, Router):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(dtype)
    return model


def replicate_mtp_head(model: MiMoModel, num_heads: int) -> MiMoModel:
    """Give the model `num_heads` MTP heads, each a copy of its first: the step from pre-training to later stages."""
    if not model.mtp_heads:
        raise ShapeError("the model has no MTP head to replicate; pre-train with at least one")
    state = model.mtp_heads[0].state_dict()
    config = model.config.replace(num_mtp_heads=num_heads)
    reference = next(model.parameters())
    heads = nn.ModuleList(MTPHead(config) for _ in range(num_heads)).to(reference.device, reference.dtype)
    for head in heads:
        head.load_state_dict(state)
    model.mtp_heads, model.config = heads, config
    return model.set_invariant(model.invariant)
