"""`TorchRunner`: the readable runner, on any device PyTorch has.

Suffixes as in `runner.py`; D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmimo.config.model import ModelConfig
from openmimo.engine.runner import Int32, Routes, RowState, StepInput, StepOutput
from openmimo.engine.torch_cache import FlatTokens, TorchCache
from openmimo.engine.torch_static import StaticDecoder, choose_graphs
from openmimo.errors import RequestError, ShapeError
from openmimo.model import MiMoModel


@dataclass(frozen=True)
class _Forward:
    """What later calls need of the last `forward`: hidden states of sequence s lie from `offsets_S[s]` on.

    `num_places` is the number of places of each sequence in a static step, 0 in another.
    """

    rows_S: Int32
    starts_S: Int32
    offsets_S: np.ndarray
    hidden_ND: Tensor
    num_places: int = 0


class TorchRunner:
    """The model's own layers on flat tokens, over rings and pages.

    Matrix libraries choose their kernel by shape, so logits of a token may differ in the last bit with what else is in
    the step: near ties can resolve differently from batch to batch. Not so with an invariant model
    (`MiMoModel.set_invariant`), whose bits here are those of its training pass; it runs without graphs.
    `graphs` says how decode steps run: "cuda" replays CUDA graphs, "compile" runs them through `torch.compile`, "off"
    as prompts do; "auto" is "cuda" on CUDA and "off" elsewhere. Both prepare a step's shape when it first occurs.
    Raises: RequestError on other words, for "cuda" where the model is not on CUDA, or for graphs of an invariant model.
    """

    def __init__(
        self, model: MiMoModel, *, num_rows: int, num_pages: int, max_step_tokens: int, graphs: str = "auto"
    ) -> None:
        self.model = model
        self.num_rows, self.num_pages, self.max_step_tokens = num_rows, num_pages, max_step_tokens
        weight = model.embed_tokens.weight
        if model.invariant and graphs not in ("auto", "off"):
            raise RequestError(f"graphs={graphs!r} would not keep an invariant model's bits; leave it out")
        self.graphs = "off" if model.invariant else choose_graphs(graphs, weight.device)
        rooms = {"num_rows": num_rows, "num_pages": num_pages}
        self._static: StaticDecoder | None = None
        with torch.inference_mode():
            self.cache = TorchCache(
                model.config, **rooms, dtype=weight.dtype, device=weight.device, spare=self.graphs != "off"
            )
            if self.graphs != "off":
                self._static = StaticDecoder(model, self.cache, graphs=self.graphs, **rooms)
        self._last: _Forward | None = None

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

    @torch.no_grad()
    def load_weights(self, model: MiMoModel) -> None:
        """Copy a model's weights into this runner's own; nothing to do for the model that it computes with.

        Raises: RequestError if the shapes are not those of this runner's model.
        """
        if model is self.model:
            return
        try:
            self.model.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise RequestError(f"the runner cannot take these weights: {error}") from error

    @torch.inference_mode()
    def forward(self, step: StepInput) -> StepOutput:
        if not 0 < len(step.token_ids_N) <= self.max_step_tokens:
            raise ShapeError(f"a step of {len(step.token_ids_N)} tokens; this runner takes 1 to {self.max_step_tokens}")
        rows_S, starts_S, counts_S = step.rows_S.copy(), step.starts_S.copy(), step.counts_S.copy()
        self.cache.clear_new(step)
        if self._static is not None and self._static.takes(step):
            output, offsets_S, num_places = self._static.forward(step)
            self._last = _Forward(rows_S, starts_S, offsets_S, self._static.hidden_ND, num_places)
            return output
        tokens = self._tokens(rows_S, starts_S, counts_S, step.page_tables)
        hidden_ND, experts = tokens.run_layers(self.model, tokens.tensor(step.token_ids_N))
        self._last = _Forward(rows_S, starts_S, tokens.offsets_S, hidden_ND)
        wanted_MD = hidden_ND[tokens.tensor(step.logits_M)]
        logits_MV = self.model.lm_head(self.model.norm(wanted_MD)).float().cpu().numpy()
        return StepOutput(logits_MV=logits_MV, routed_experts_NLk=self._routes(experts, len(hidden_ND)))

    @torch.inference_mode()
    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        lengths_S = np.array([len(ids) for ids in next_ids], dtype=np.int32)
        for head in range(self.config.num_mtp_heads):
            counts_now_S = np.minimum(counts_S, np.maximum(lengths_S - head, 0)).astype(np.int32)
            some_S = counts_now_S > 0
            if not some_S.any():
                return
            tokens = self._tokens(rows_S[some_S], starts_S[some_S], counts_now_S[some_S])
            hidden_ND = torch.cat(
                [self._hidden_at(rows_S[s], starts_S[s], counts_now_S[s]) for s in np.flatnonzero(some_S)]
            )
            ids_N = np.concatenate([next_ids[s][head : head + counts_now_S[s]] for s in np.flatnonzero(some_S)])
            self._run_head(head, hidden_ND, ids_N, tokens)

    @torch.inference_mode()
    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        assert self._last is not None
        last, width = self._last, self.cache.history_RWD.shape[1]
        kept_of = dict(zip(rows_S.tolist(), kept_S.tolist(), strict=True))
        kept_S = np.array([kept_of.get(row, 0) for row in last.rows_S.tolist()], dtype=np.int32)
        if last.num_places:
            assert self._static is not None
            self._static.commit(last.rows_S, last.starts_S, kept_S, last.num_places)
            return
        newest_S = np.minimum(kept_S, width)
        steps_n = np.concatenate([np.arange(kept - new, kept) for kept, new in zip(kept_S, newest_S, strict=True)])
        sequence_n = np.repeat(np.arange(len(kept_S)), newest_S)
        rows_n = self._tensor(last.rows_S[sequence_n])
        slots_n = self._tensor((last.starts_S[sequence_n] + steps_n) % width)
        self.cache.history_RWD[rows_n, slots_n] = last.hidden_ND[self._tensor(last.offsets_S[sequence_n] + steps_n)]

    @torch.inference_mode()
    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        width, num_heads = tokens_SW.shape[1], self.config.num_mtp_heads
        if self._static is not None and num_heads:
            return self._static.draft(rows_S, lengths_S, tokens_SW)
        counts_S = np.minimum(lengths_S, width).astype(np.int32)
        starts_S = (lengths_S - counts_S).astype(np.int32)
        tokens = self._tokens(rows_S, starts_S, counts_S)
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

    def _tokens(
        self, rows_S: Int32, starts_S: Int32, counts_S: Int32, page_tables: tuple[Int32, ...] | None = None
    ) -> FlatTokens:
        invariant = self.model.invariant
        return FlatTokens(self.config, self.cache, rows_S, starts_S, counts_S, page_tables, invariant=invariant)

    def _run_head(self, head: int, hidden_ND: Tensor, ids_N: np.ndarray, tokens: FlatTokens) -> Tensor:
        return tokens.run_head(self.model, head, hidden_ND, tokens.tensor(ids_N))

    def _hidden_at(self, row: int, start: int, count: int) -> Tensor:
        """Hidden states of positions from `start` on: of the last forward, before it from the row's history."""
        assert self._last is not None
        last, width = self._last, self.cache.history_RWD.shape[1]
        sequence = int(np.flatnonzero(last.rows_S == row)[0])
        first = int(last.starts_S[sequence])
        old = self._tensor(np.arange(start, min(first, start + count)) % width)
        offset = int(last.offsets_S[sequence]) - first
        new_ND = last.hidden_ND[offset + max(first, start) : max(offset + start + count, offset + first)]
        return torch.cat((self.cache.history_RWD[row, old], new_ND))

    def _routes(self, experts: list[Tensor], num_tokens: int) -> Routes:
        if not experts or self.config.moe is None:
            return np.zeros((num_tokens, 0, 0), dtype=np.uint8)
        dtype = np.uint8 if self.config.moe.num_experts <= 256 else np.uint16
        return torch.stack(experts, dim=1).cpu().numpy().astype(dtype)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self.cache.indices(array)


def _as_bytes(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).flatten().cpu().numpy().copy()
