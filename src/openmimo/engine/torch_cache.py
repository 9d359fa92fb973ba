"""Rings and pages of `TorchRunner`, and attention of flat tokens over them.

Sequences of a few tokens are padded to one another and attend together; a prompt's chunk attends alone.
Suffixes: S sequences, T their tokens when padded, N flat tokens, C slots of a ring, R rows, P pages, L layers,
H query heads, G key/value heads, K QK dim, V value dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.engine.runner import PAGE_TOKENS, Int32, StepInput
from openmimo.model import MiMoModel
from openmimo.model.attention import AttentionPlan, attend
from openmimo.model.masks import with_sink_columns
from openmimo.model.ordered import OrderedKeys, order_keys
from openmimo.model.rope import rotary_tables

# Which keys queries see: an additive mask, or in invariant passes the keys in the order of their positions.
Visible = Tensor | OrderedKeys

# Sequences with at most this many tokens in a step are padded to one another.
PADDED_TOKENS = 8


class TorchCache:
    """Keys and values of every row and page, and the hidden states of each row's last 2K positions.

    Position p of a row lies in ring slot p modulo the ring's size; its hidden state in history place p modulo 2K.
    With `spare` there are one more row and page, the last ones, for what padding writes.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: bool = False,
    ) -> None:
        num_rows, num_pages = num_rows + spare, num_pages + spare
        self.spare_row, self.spare_page = num_rows - 1, num_pages - 1
        sliding, full, heads = config.sliding_attention, config.global_attention, config.num_mtp_heads
        assert sliding.window_keys is not None
        self.num_main_rings = sum(kind is AttentionKind.SLIDING for kind in config.layer_kinds)
        rings = (num_rows, self.num_main_rings + heads, sliding.window_keys - 1 + max(1 + heads, 2 * heads))
        pages = (num_pages, config.num_layers - self.num_main_rings, PAGE_TOKENS)

        def zeros(*shape: int) -> Tensor:
            # As in `clear_new`: masked keys are still multiplied by a probability of 0, and 0 * NaN is NaN.
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ring_k_RLCGK = zeros(*rings, sliding.num_kv_heads, sliding.qk_head_dim)
        self.ring_v_RLCGV = zeros(*rings, sliding.num_kv_heads, sliding.v_head_dim)
        self.page_k_PLTGK = zeros(*pages, full.num_kv_heads, full.qk_head_dim)
        self.page_v_PLTGV = zeros(*pages, full.num_kv_heads, full.v_head_dim)
        self.history_RWD = zeros(num_rows, max(1, 2 * heads), config.hidden_size)

    def clear_new(self, step: StepInput) -> None:
        """Forget what was in rows whose sequences begin with this step, and in the pages that it begins."""
        new_rows = step.rows_S[step.starts_S == 0]
        if len(new_rows):
            for rows in self.row_tensors:
                rows[self.indices(new_rows)] = 0
        spans = zip(step.page_tables, -(-step.starts_S // PAGE_TOKENS), step.starts_S + step.counts_S, strict=True)
        new_pages = [page for table, first, end in spans for page in table[first : -(-end // PAGE_TOKENS)].tolist()]
        if new_pages:
            for pages in self.page_tensors:
                pages[self.indices(np.array(new_pages))] = 0

    @property
    def row_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ring_k_RLCGK, self.ring_v_RLCGV, self.history_RWD

    @property
    def page_tensors(self) -> tuple[Tensor, Tensor]:
        return self.page_k_PLTGK, self.page_v_PLTGV

    @property
    def num_slots(self) -> int:
        return self.ring_k_RLCGK.shape[2]

    @property
    def device(self) -> torch.device:
        return self.history_RWD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.history_RWD.dtype

    def indices(self, array: np.ndarray) -> Tensor:
        """On the cache's device."""
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def attend_ring(
        self,
        ring: int,
        rows_S: Tensor,
        q_STHK: Tensor,
        k_STGK: Tensor,
        v_STGV: Tensor,
        visible: Visible,
        sink_H: Tensor | None,
    ) -> Tensor:
        """Attention to what the rows' ring holds and, behind it, to new tokens. Shapes: -> (S, T, H, V)."""
        k_SCGK = torch.cat((self.ring_k_RLCGK[:, ring][rows_S], k_STGK), dim=1)
        v_SCGV = torch.cat((self.ring_v_RLCGV[:, ring][rows_S], v_STGV), dim=1)
        return _attend(q_STHK, k_SCGK, v_SCGV, visible, sink_H)

    def write_ring(self, ring: int, rows: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.ring_k_RLCGK[:, ring][rows, slots] = k
        self.ring_v_RLCGV[:, ring][rows, slots] = v

    def attend_pages(
        self, layer: int, pages_SP: Tensor, q_STHK: Tensor, visible: Visible, sink_H: Tensor | None
    ) -> Tensor:
        """Attention to all positions of the page tables. Shapes: -> (S, T, H, V)."""
        k_SCGK = self.page_k_PLTGK[:, layer][pages_SP].flatten(1, 2)
        v_SCGV = self.page_v_PLTGV[:, layer][pages_SP].flatten(1, 2)
        return _attend(q_STHK, k_SCGK, v_SCGV, visible, sink_H)

    def write_pages(self, layer: int, page_ids: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.page_k_PLTGK[:, layer][page_ids, slots] = k
        self.page_v_PLTGV[:, layer][page_ids, slots] = v


def _attend(q_STHK: Tensor, k_SCGK: Tensor, v_SCGV: Tensor, visible: Visible, sink_H: Tensor | None) -> Tensor:
    if isinstance(visible, OrderedKeys):
        return visible.attend(q_STHK, k_SCGK, v_SCGV, sink_H)
    bias_STC = with_sink_columns(visible) if sink_H is not None else visible
    return attend(q_STHK, k_SCGK, v_SCGV, bias=bias_STC, sink_H=sink_H)


class CachedTokens(ABC):
    """The tokens of one pass over a cache: where each attends, and where its keys are written.

    `static` and `invariant` choose forms: see `AttentionPlan` and `MiMoModel.set_invariant`.
    """

    static = False
    invariant = False

    def __init__(self, config: ModelConfig, cache: TorchCache) -> None:
        self.config, self.cache = config, cache
        self.plans: dict[AttentionKind, AttentionPlan] = {}

    @abstractmethod
    def attend_ring(self, ring: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        """Attention to what the ring held before this pass and to the new tokens, which then go into the ring."""

    @abstractmethod
    def attend_pages(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        """Attention to the pages, after the new tokens went into them."""

    def run_layers(self, model: MiMoModel, token_ids_N: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All main layers. Shapes: -> hidden (N, D) and the chosen experts (N, k) of every sparse layer."""
        x_1ND = model.embed_tokens(token_ids_N)[None]
        experts: list[Tensor] = []
        num_seen = dict.fromkeys(AttentionKind, 0)
        for layer, kind in zip(model.layers, self.config.layer_kinds, strict=True):
            x_1ND, routing = layer(x_1ND, self._layer_plan(kind, num_seen[kind]))
            num_seen[kind] += 1
            if routing is not None:
                experts.append(routing.experts_BTk[0])
        return x_1ND[0], experts

    def run_head(self, model: MiMoModel, head: int, hidden_ND: Tensor, ids_N: Tensor) -> Tensor:
        """One MTP head, whose ring lies behind those of the main layers. Shapes: -> (N, D) for `lm_head`."""
        plan = self._layer_plan(AttentionKind.SLIDING, self.cache.num_main_rings + head)
        return model.mtp_forward(head, hidden_ND[None], ids_N[None], plan)[0]

    def make_plans(self, positions_N: Tensor) -> None:
        """Rotary tables, once for all layers of a kind."""
        for kind in AttentionKind:
            theta, dim = self.config.attention(kind).rope_theta, self.config.rotary_dim(kind)
            cos, sin = rotary_tables(positions_N[None], dim, theta, is_invariant=self.invariant)
            self.plans[kind] = AttentionPlan(kind, cos, sin, None, static=self.static)

    def _layer_plan(self, kind: AttentionKind, number: int) -> AttentionPlan:
        """The plan of layer `number` among those of its kind."""
        function = self.attend_ring if kind is AttentionKind.SLIDING else self.attend_pages

        def attend(q: Tensor, k: Tensor, v: Tensor, sink_H: Tensor | None) -> Tensor:
            return function(number, q[0], k[0], v[0], sink_H)[None]

        return replace(self.plans[kind], attend=attend)


def ring_positions(starts_S: Tensor, num_slots: int) -> Tensor:
    """The position in every ring slot before a pass: the newest before its start that is congruent to the slot.

    What a rejected draft left there counts as a position further back than any window. Shapes: -> (S, C).
    """
    last_S1 = starts_S[:, None] - 1
    return last_S1 - (last_S1 - torch.arange(num_slots, device=starts_S.device)) % num_slots


def visible_bias(positions_ST: Tensor, keys_SC: Tensor, window_keys: int | None, dtype: torch.dtype) -> Tensor:
    """0 where the key is at or before the query (and in its window), minus infinity elsewhere. Shape (S, T, C)."""
    distance_STC = positions_ST[:, :, None] - keys_SC[:, None, :]
    hidden_STC = (distance_STC < 0) | (keys_SC[:, None, :] < 0)
    if window_keys is not None:
        hidden_STC = hidden_STC | (distance_STC >= window_keys)
    return torch.zeros(hidden_STC.shape, dtype=dtype, device=keys_SC.device).masked_fill_(hidden_STC, float("-inf"))


@dataclass(frozen=True)
class _Group:
    """Sequences that attend together.

    `places_ST` are the flat places of their tokens, short ones padded with their last; the output at
    `kept_ST` goes to `targets_n`. `in_ring` and `in_pages` say which keys are seen, `pages_SP` are the page tables.
    """

    rows_S: Tensor
    places_ST: Tensor
    kept_ST: Tensor
    targets_n: Tensor
    in_ring: Visible
    in_pages: Visible | None
    pages_SP: Tensor | None


class FlatTokens(CachedTokens):
    """The tokens of one pass, sequence after sequence: positions, groups, and where keys are written.

    Without `page_tables` it serves a pass of MTP heads, which have rings only.
    """

    def __init__(
        self,
        config: ModelConfig,
        cache: TorchCache,
        rows_S: Int32,
        starts_S: Int32,
        counts_S: Int32,
        page_tables: tuple[Int32, ...] | None = None,
        *,
        invariant: bool = False,
    ) -> None:
        super().__init__(config, cache)
        self.invariant = invariant
        self.rows_S, self.starts_S, self.counts_S = rows_S, starts_S, counts_S
        self.offsets_S = np.cumsum(counts_S) - counts_S
        self.sequence_N = np.repeat(np.arange(len(counts_S)), counts_S)
        self.positions_N = np.arange(len(self.sequence_N)) - (self.offsets_S - starts_S)[self.sequence_N]
        self.page_tables = page_tables
        self._choose_slots()
        self.groups = [self._group(members) for members in self._partition()]
        self.make_plans(self.tensor(self.positions_N))

    def attend_ring(self, ring: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        out_NHV = q_NHK.new_empty(*q_NHK.shape[:2], v_NGV.shape[-1])
        for group in self.groups:
            q_STHK, k_STGK, v_STGV = (x[group.places_ST] for x in (q_NHK, k_NGK, v_NGV))
            out_STHV = self.cache.attend_ring(ring, group.rows_S, q_STHK, k_STGK, v_STGV, group.in_ring, sink_H)
            out_NHV[group.targets_n] = out_STHV[group.kept_ST]
        k_nGK, v_nGV = k_NGK[self.ring_places_n], v_NGV[self.ring_places_n]
        self.cache.write_ring(ring, self.ring_rows_n, self.ring_slots_n, k_nGK, v_nGV)
        return out_NHV

    def attend_pages(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        self.cache.write_pages(layer, self.page_ids_N, self.page_slots_N, k_NGK, v_NGV)
        out_NHV = q_NHK.new_empty(*q_NHK.shape[:2], v_NGV.shape[-1])
        for group in self.groups:
            assert group.pages_SP is not None
            assert group.in_pages is not None
            q_STHK = q_NHK[group.places_ST]
            out_STHV = self.cache.attend_pages(layer, group.pages_SP, q_STHK, group.in_pages, sink_H)
            out_NHV[group.targets_n] = out_STHV[group.kept_ST]
        return out_NHV

    def tensor(self, array: np.ndarray) -> Tensor:
        """Indices on the cache's device."""
        return self.cache.indices(array)

    def _choose_slots(self) -> None:
        """A ring takes a sequence's last tokens, as many as it has slots: each slot is written once."""
        num_slots = self.cache.num_slots
        last_N = (self.starts_S + self.counts_S)[self.sequence_N]
        places_n = np.flatnonzero(self.positions_N >= last_N - num_slots)
        self.ring_places_n = self.tensor(places_n)
        self.ring_rows_n = self.tensor(self.rows_S[self.sequence_N[places_n]])
        self.ring_slots_n = self.tensor(self.positions_N[places_n] % num_slots)
        if self.page_tables is not None:
            pairs = zip(self.sequence_N, self.positions_N // PAGE_TOKENS, strict=True)
            pages = [self.page_tables[sequence][page] for sequence, page in pairs]
            self.page_ids_N = self.tensor(np.array(pages, dtype=np.int64))
            self.page_slots_N = self.tensor(self.positions_N % PAGE_TOKENS)

    def _partition(self) -> list[np.ndarray]:
        short_S = self.counts_S <= PADDED_TOKENS
        groups = [np.array([index]) for index in np.flatnonzero(~short_S)]
        return [*groups, np.flatnonzero(short_S)] if short_S.any() else groups

    def _group(self, members_S: np.ndarray) -> _Group:
        counts_S1 = self.counts_S[members_S][:, None]
        steps_ST = np.minimum(np.arange(counts_S1.max()), counts_S1 - 1)
        kept_ST = np.arange(counts_S1.max()) < counts_S1
        places_ST = self.offsets_S[members_S][:, None] + steps_ST
        positions_ST = self.tensor(self.starts_S[members_S][:, None] + steps_ST)
        on_device = torch.from_numpy(kept_ST).to(self.cache.device)
        old_SC = ring_positions(self.tensor(self.starts_S[members_S]), self.cache.num_slots)
        keys_SC = torch.cat((old_SC, positions_ST.masked_fill(~on_device, -1)), dim=1)
        pages_SP = in_pages = None
        if self.page_tables is not None:
            pages_SP = self._pages(members_S)
            keys_1C = torch.arange(pages_SP.shape[1] * PAGE_TOKENS, device=self.cache.device)[None]
            in_pages = self._visible(positions_ST, keys_1C.expand(len(members_S), -1), None)
        return _Group(
            rows_S=self.tensor(self.rows_S[members_S]),
            places_ST=self.tensor(places_ST),
            kept_ST=on_device,
            targets_n=self.tensor(places_ST[kept_ST]),
            in_ring=self._visible(positions_ST, keys_SC, self.config.sliding_attention.window_keys),
            in_pages=in_pages,
            pages_SP=pages_SP,
        )

    def _visible(self, positions_ST: Tensor, keys_SC: Tensor, window_keys: int | None) -> Visible:
        if self.invariant:
            return order_keys(positions_ST, keys_SC, window_keys)
        return visible_bias(positions_ST, keys_SC, window_keys, self.cache.dtype)

    def _pages(self, members_S: np.ndarray) -> Tensor:
        """The members' page tables, padded with their first page: masked, and as finite as the sequence itself."""
        assert self.page_tables is not None
        counts = [-(-int(self.starts_S[m] + self.counts_S[m]) // PAGE_TOKENS) for m in members_S]
        pages_SP = np.zeros((len(members_S), max(counts)), dtype=np.int64)
        for place, (member, count) in enumerate(zip(members_S, counts, strict=True)):
            pages_SP[place, :count] = self.page_tables[member][:count]
            pages_SP[place, count:] = self.page_tables[member][0]
        return self.tensor(pages_SP)
