"""`TorchRunner`: the readable runner, on any device PyTorch has.

Suffixes as in `runner.py`; D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.engine.runner import Int32, Routes, RowState, StepInput, StepOutput
from openmimo.engine.torch_cache import FlatTokens, TorchCache
from openmimo.errors import ShapeError
from openmimo.model import MiMoModel


class TorchRunner:
    """The model's own layers on flat tokens, over rings and pages.

    Matrix libraries choose their kernel by shape, so logits of a token may differ in the last bit with what else is in
    the step: near ties can resolve differently from batch to batch.
    """

    def __init__(self, model: MiMoModel, *, num_rows: int, num_pages: int, max_step_tokens: int) -> None:
        self.model = model
        self.num_rows, self.num_pages, self.max_step_tokens = num_rows, num_pages, max_step_tokens
        weight = model.embed_tokens.weight
        with torch.inference_mode():
            self.cache = TorchCache(
                model.config, num_rows=num_rows, num_pages=num_pages, dtype=weight.dtype, device=weight.device
            )
        self._plan_numbers = _plan_numbers(model.config)
        self._tokens: FlatTokens | None = None
        self._hidden_ND: Tensor | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def row_bytes(self) -> int:
        return sum(x[0].nbytes for x in (self.cache.ring_k_RLCGK, self.cache.ring_v_RLCGV))

    @property
    def page_bytes(self) -> int:
        return sum(x[0].nbytes for x in self.cache.page_tensors)

    @property
    def cache_bytes(self) -> int:
        return self.num_rows * self.row_bytes + self.num_pages * self.page_bytes

    @torch.inference_mode()
    def forward(self, step: StepInput) -> StepOutput:
        if not 0 < len(step.token_ids_N) <= self.max_step_tokens:
            raise ShapeError(f"a step of {len(step.token_ids_N)} tokens; this runner takes 1 to {self.max_step_tokens}")
        tokens = FlatTokens(
            self.config, self.cache, step.rows_S.copy(), step.starts_S.copy(), step.counts_S.copy(), step.page_tables
        )
        x_1ND = self.model.embed_tokens(tokens.tensor(step.token_ids_N))[None]
        experts: list[Tensor] = []
        for layer, kind, number in zip(self.model.layers, self.config.layer_kinds, self._plan_numbers, strict=True):
            plan = tokens.ring_plan(number) if kind is AttentionKind.SLIDING else tokens.page_plan(number)
            x_1ND, routing = layer(x_1ND, plan)
            if routing is not None:
                experts.append(routing.experts_BTk[0])
        hidden_ND = x_1ND[0]
        self._tokens, self._hidden_ND = tokens, hidden_ND
        wanted_MD = hidden_ND[tokens.tensor(step.logits_M)]
        logits_MV = self.model.lm_head(self.model.norm(wanted_MD)).float().cpu().numpy()
        return StepOutput(logits_MV=logits_MV, routed_experts_NLk=self._routes(experts))

    @torch.inference_mode()
    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        lengths_S = np.array([len(ids) for ids in next_ids], dtype=np.int32)
        for head in range(self.config.num_mtp_heads):
            counts_now_S = np.minimum(counts_S, np.maximum(lengths_S - head, 0)).astype(np.int32)
            some_S = counts_now_S > 0
            if not some_S.any():
                return
            tokens = FlatTokens(self.config, self.cache, rows_S[some_S], starts_S[some_S], counts_now_S[some_S])
            hidden_ND = torch.cat(
                [self._hidden_at(rows_S[s], starts_S[s], counts_now_S[s]) for s in np.flatnonzero(some_S)]
            )
            ids_N = np.concatenate([next_ids[s][head : head + counts_now_S[s]] for s in np.flatnonzero(some_S)])
            self._run_head(head, hidden_ND, ids_N, tokens)

    @torch.inference_mode()
    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        assert self._tokens is not None
        assert self._hidden_ND is not None
        tokens, width = self._tokens, self.cache.history_RWD.shape[1]
        sequence_of = {int(row): sequence for sequence, row in enumerate(tokens.rows_S)}
        places: list[int] = []
        for row, kept in zip(rows_S.tolist(), kept_S.tolist(), strict=True):
            end = int(tokens.offsets_S[sequence_of[row]]) + kept
            places += range(end - min(kept, width), end)
        rows_n = tokens.tensor(tokens.rows_S[tokens.sequence_N[places]])
        slots_n = tokens.tensor(tokens.positions_N[places] % width)
        self.cache.history_RWD[rows_n, slots_n] = self._hidden_ND[tokens.tensor(np.array(places))]

    @torch.inference_mode()
    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        width, num_heads = tokens_SW.shape[1], self.config.num_mtp_heads
        counts_S = np.minimum(lengths_S, width).astype(np.int32)
        starts_S = (lengths_S - counts_S).astype(np.int32)
        tokens = FlatTokens(self.config, self.cache, rows_S, starts_S, counts_S)
        slots_N = tokens.tensor(tokens.positions_N % self.cache.history_RWD.shape[1])
        hidden_ND = self.cache.history_RWD[tokens.tensor(rows_S[tokens.sequence_N]), slots_N]
        last_S = tokens.tensor(tokens.offsets_S + counts_S - 1)
        # Column of the id right after each position: the last column holds the id at position `length`.
        columns_N = tokens.positions_N + width - lengths_S[tokens.sequence_N]
        text_SX = np.concatenate((tokens_SW, np.zeros((len(rows_S), num_heads), dtype=np.int32)), axis=1)
        for head in range(num_heads):
            ids_N = text_SX[tokens.sequence_N, columns_N + head]
            out_ND = self._run_head(head, hidden_ND, ids_N, tokens)
            text_SX[:, width + head] = self.model.lm_head(out_ND[last_S]).argmax(-1).cpu().numpy()
        return text_SX[:, width:]

    @torch.inference_mode()
    def copy_page(self, source: int, target: int) -> None:
        for pages in self.cache.page_tensors:
            pages[target] = pages[source]

    @torch.inference_mode()
    def copy_row(self, source: int, target: int) -> None:
        for rows in self.cache.row_tensors:
            rows[target] = rows[source]

    def read_row(self, row: int) -> RowState:
        return RowState(tuple(_as_bytes(rows[row]) for rows in self.cache.row_tensors))

    @torch.inference_mode()
    def write_row(self, row: int, state: RowState) -> None:
        for rows, array in zip(self.cache.row_tensors, state.arrays, strict=True):
            rows[row] = torch.from_numpy(array).to(rows.device).view(rows.dtype).view(rows.shape[1:])

    def _run_head(self, head: int, hidden_ND: Tensor, ids_N: np.ndarray, tokens: FlatTokens) -> Tensor:
        plan = tokens.ring_plan(self.cache.num_main_rings + head)
        return self.model.mtp_forward(head, hidden_ND[None], tokens.tensor(ids_N)[None], plan)[0]

    def _hidden_at(self, row: int, start: int, count: int) -> Tensor:
        """Hidden states of positions from `start` on: of the last forward, before it from the row's history."""
        assert self._tokens is not None
        assert self._hidden_ND is not None
        tokens, width = self._tokens, self.cache.history_RWD.shape[1]
        sequence = int(np.flatnonzero(tokens.rows_S == row)[0])
        first = int(tokens.starts_S[sequence])
        old = tokens.tensor(np.arange(start, min(first, start + count)) % width)
        offset = int(tokens.offsets_S[sequence]) - first
        new_ND = self._hidden_ND[offset + max(first, start) : max(offset + start + count, offset + first)]
        return torch.cat((self.cache.history_RWD[row, old], new_ND))

    def _routes(self, experts: list[Tensor]) -> Routes:
        assert self._hidden_ND is not None
        if not experts or self.config.moe is None:
            return np.zeros((self._hidden_ND.shape[0], 0, 0), dtype=np.uint8)
        dtype = np.uint8 if self.config.moe.num_experts <= 256 else np.uint16
        return torch.stack(experts, dim=1).cpu().numpy().astype(dtype)


def _plan_numbers(config: ModelConfig) -> list[int]:
    """Each layer's number among the layers of its kind."""
    return [config.layer_kinds[:index].count(kind) for index, kind in enumerate(config.layer_kinds)]


def _as_bytes(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).flatten().cpu().numpy().copy()
