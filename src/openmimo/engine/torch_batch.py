"""The seam between the engine and whatever computes: a `Runner` opens a batch, a batch advances its rows.

Suffixes: B rows, T tokens of a step, V vocabulary, L sparse layers, k chosen experts, K drafts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from openmimo.config.model import ModelConfig
from openmimo.engine.speculate import Drafter, window_tokens
from openmimo.model import Cache, MiMoModel, ModelOutput


class RunningBatch(Protocol):
    """A fixed number of rows, each a sequence at its own length.

    A row starts with `prefill`. Then `propose`, `verify` and `commit` follow each other for all rows together;
    a row that is idle commits 0 tokens. The newest token of a row is chosen but not yet fed.
    """

    def prefill(self, row: int, token_ids: list[int]) -> Tensor:
        """Start a row with a prompt; return the logits of the token after it, shape (V,)."""
        ...

    def propose(self, last_B: Tensor) -> Tensor:
        """The window to verify: each row's newest token, then its drafts, then padding. Shape (B, T)."""
        ...

    def verify(self, window_BT: Tensor) -> Tensor:
        """The logits after each token of the window, shape (B, T, V). Nothing is kept until `commit`."""
        ...

    def commit(self, num_tokens_B: Tensor) -> None:
        """Keep the first tokens of each row's window and forget the others."""
        ...

    @property
    def routed_experts(self) -> Tensor:
        """Chosen experts of the last `prefill` (1, T, L, k) or `verify` (B, T, L, k)."""
        ...


class Runner(Protocol):
    """A model ready to decode."""

    @property
    def config(self) -> ModelConfig: ...

    def open_batch(self, batch_size: int, *, num_drafts: int, step_tokens: int) -> RunningBatch:
        """A batch of empty rows whose windows have `step_tokens` >= 1 + `num_drafts` tokens."""
        ...


class TorchRunner:
    """The readable runner: PyTorch on any device, one forward pass of all rows per step.

    Why `step_tokens` may exceed 1 + drafts: matrix libraries pick their kernel by shape, so the logits of a token
    can differ in the last bit between a 1-row and a 4-row product, and a near tie would then resolve differently
    with drafting on and off. When both run windows of equal width through batches of equal size, all products but
    the experts' have the same shape. An expert's product has as many rows as tokens chose it; on the CPU that matters
    in fp32 below 4 rows (a different kernel, differences near 1e-7) and not at all in bf16.
    """

    def __init__(self, model: MiMoModel) -> None:
        self.model = model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def open_batch(self, batch_size: int, *, num_drafts: int, step_tokens: int) -> TorchBatch:
        return TorchBatch(self.model, batch_size, num_drafts=num_drafts, step_tokens=step_tokens)


class TorchBatch:
    """Rows that share one cache. Prompts run alone through the whole-sequence path and are copied into their row."""

    @torch.inference_mode()
    def __init__(self, model: MiMoModel, batch_size: int, *, num_drafts: int, step_tokens: int) -> None:
        self.model = model
        self.step_tokens = step_tokens
        self.cache_step_tokens = max(step_tokens, window_tokens(num_drafts))
        self.cache = self._new_cache(batch_size)
        self.drafter = Drafter(model, num_drafts=num_drafts, batch_size=batch_size) if num_drafts else None
        self._output: ModelOutput | None = None

    @torch.inference_mode()
    def prefill(self, row: int, token_ids: list[int]) -> Tensor:
        cache = self._new_cache(1)
        tokens_BT = torch.tensor([token_ids], device=self.cache.length_B.device)
        self._output = output = self.model(tokens_BT, cache=cache)
        if self.drafter is not None:
            self.drafter.prefill(row, output, cache)
        cache.commit(len(token_ids))
        self.cache.copy_row(row, cache)
        return self.model.lm_head(self.model.norm(output.hidden_BTD[0, -1]))

    @torch.inference_mode()
    def propose(self, last_B: Tensor) -> Tensor:
        last_B = last_B.to(self.cache.length_B.device)
        window_BT = last_B[:, None]
        if self.drafter is not None:
            window_BT = torch.cat((window_BT, self.drafter.draft(last_B, self.cache)), dim=1)
        return torch.nn.functional.pad(window_BT, (0, self.step_tokens - window_BT.shape[1]))

    @torch.inference_mode()
    def verify(self, window_BT: Tensor) -> Tensor:
        self._output = output = self.model(window_BT, cache=self.cache)
        return output.logits

    @torch.inference_mode()
    def commit(self, num_tokens_B: Tensor) -> None:
        assert self._output is not None
        self.cache.commit(num_tokens_B)
        if self.drafter is not None:
            self.drafter.advance(self._output.token_ids_BT, self._output.hidden_BTD, num_tokens_B)

    @property
    def routed_experts(self) -> Tensor:
        assert self._output is not None
        return self._output.routed_experts

    def _new_cache(self, batch_size: int) -> Cache:
        weight = self.model.embed_tokens.weight
        return Cache(
            self.model.config,
            batch_size=batch_size,
            step_tokens=self.cache_step_tokens,
            dtype=weight.dtype,
            device=weight.device,
        )
