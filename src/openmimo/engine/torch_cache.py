"""Rings and pages of `TorchRunner`, and attention of flat tokens over them.

Sequences of a few tokens are padded to one another and attend together; a prompt's chunk attends alone.
Suffixes: S sequences, T their tokens when padded, N flat tokens, C slots of a ring, R rows, P pages, L layers,
H query heads, G key/value heads, K QK dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from openmimo.config.model import AttentionKind, ModelConfig
from openmimo.engine.runner import PAGE_TOKENS, Int32
from openmimo.model.attention import AttentionPlan, attend, with_sink_columns
from openmimo.model.rope import rotary_tables

# Sequences with at most this many tokens in a step are padded to one another.
PADDED_TOKENS = 8


class TorchCache:
    """Keys and values of every row and page, and the hidden states of each row's last 2K positions.

    Position p of a row lies in ring slot p modulo the ring's size; its hidden state in history place p modulo 2K.
    """

    def __init__(
        self, config: ModelConfig, *, num_rows: int, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        sliding, full, heads = config.sliding_attention, config.global_attention, config.num_mtp_heads
        assert sliding.window_keys is not None
        self.num_main_rings = sum(kind is AttentionKind.SLIDING for kind in config.layer_kinds)
        rings = (num_rows, self.num_main_rings + heads, sliding.window_keys - 1 + max(1 + heads, 2 * heads))
        pages = (num_pages, config.num_layers - self.num_main_rings, PAGE_TOKENS)

        def zeros(*shape: int) -> Tensor:
            # Not garbage: masked keys are still multiplied by a probability of 0, and 0 * NaN is NaN.
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ring_k_RLCGK = zeros(*rings, sliding.num_kv_heads, sliding.qk_head_dim)
        self.ring_v_RLCGV = zeros(*rings, sliding.num_kv_heads, sliding.v_head_dim)
        self.page_k_PLTGK = zeros(*pages, full.num_kv_heads, full.qk_head_dim)
        self.page_v_PLTGV = zeros(*pages, full.num_kv_heads, full.v_head_dim)
        self.history_RWD = zeros(num_rows, max(1, 2 * heads), config.hidden_size)

    @property
    def row_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ring_k_RLCGK, self.ring_v_RLCGV, self.history_RWD

    @property
    def page_tensors(self) -> tuple[Tensor, Tensor]:
        return self.page_k_PLTGK, self.page_v_PLTGV

    @property
    def device(self) -> torch.device:
        return self.history_RWD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.history_RWD.dtype


@dataclass(frozen=True)
class _Group:
    """Sequences that attend together.

    `places_ST` are the flat places of their tokens, short ones padded with their last; the output at
    `kept_ST` goes to `targets_n`. `ring_bias` and `page_bias` are additive masks, `pages_SP` the page tables.
    """

    rows_S: Tensor
    places_ST: Tensor
    kept_ST: Tensor
    targets_n: Tensor
    ring_bias: Tensor
    page_bias: Tensor | None
    pages_SP: Tensor | None


class FlatTokens:
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
    ) -> None:
        self.config, self.cache = config, cache
        self.rows_S, self.starts_S, self.counts_S = rows_S, starts_S, counts_S
        self.offsets_S = np.cumsum(counts_S) - counts_S
        self.sequence_N = np.repeat(np.arange(len(counts_S)), counts_S)
        self.positions_N = np.arange(len(self.sequence_N)) - (self.offsets_S - starts_S)[self.sequence_N]
        self.page_tables = page_tables
        self._choose_slots()
        self.groups = [self._group(members) for members in self._partition()]
        self.plans = {kind: self._plan(kind) for kind in AttentionKind}

    def ring_plan(self, ring: int) -> AttentionPlan:
        """The plan of a sliding layer or head whose keys lie in ring number `ring`."""
        attend_cached = self._with_layer(self._attend_ring, ring)
        return replace(self.plans[AttentionKind.SLIDING], attend_cached=attend_cached)

    def page_plan(self, layer: int) -> AttentionPlan:
        """The plan of global layer number `layer`."""
        attend_cached = self._with_layer(self._attend_pages, layer)
        return replace(self.plans[AttentionKind.GLOBAL], attend_cached=attend_cached)

    def _with_layer(
        self, function: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor], layer: int
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
        return lambda q, k, v, sink: function(layer, q[0], k[0], v[0], sink)[None]

    def _attend_ring(self, ring: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        """Attention to what the ring held before this pass and to the new tokens, which then go into the ring."""
        ring_k_RCGK, ring_v_RCGV = self.cache.ring_k_RLCGK[:, ring], self.cache.ring_v_RLCGV[:, ring]
        out_NHV = q_NHK.new_empty(*q_NHK.shape[:2], v_NGV.shape[-1])
        for group in self.groups:
            k_SCGK = torch.cat((ring_k_RCGK[group.rows_S], k_NGK[group.places_ST]), dim=1)
            v_SCGV = torch.cat((ring_v_RCGV[group.rows_S], v_NGV[group.places_ST]), dim=1)
            bias = with_sink_columns(group.ring_bias) if sink_H is not None else group.ring_bias
            out_STHV = attend(q_NHK[group.places_ST], k_SCGK, v_SCGV, bias=bias, sink_H=sink_H)
            out_NHV[group.targets_n] = out_STHV[group.kept_ST]
        ring_k_RCGK[self.ring_rows_n, self.ring_slots_n] = k_NGK[self.ring_places_n]
        ring_v_RCGV[self.ring_rows_n, self.ring_slots_n] = v_NGV[self.ring_places_n]
        return out_NHV

    def _attend_pages(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGV: Tensor, sink_H: Tensor | None) -> Tensor:
        page_k_PTGK, page_v_PTGV = self.cache.page_k_PLTGK[:, layer], self.cache.page_v_PLTGV[:, layer]
        page_k_PTGK[self.page_ids_N, self.page_slots_N] = k_NGK
        page_v_PTGV[self.page_ids_N, self.page_slots_N] = v_NGV
        out_NHV = q_NHK.new_empty(*q_NHK.shape[:2], v_NGV.shape[-1])
        for group in self.groups:
            assert group.pages_SP is not None
            assert group.page_bias is not None
            k_SCGK, v_SCGV = page_k_PTGK[group.pages_SP].flatten(1, 2), page_v_PTGV[group.pages_SP].flatten(1, 2)
            bias = with_sink_columns(group.page_bias) if sink_H is not None else group.page_bias
            out_STHV = attend(q_NHK[group.places_ST], k_SCGK, v_SCGV, bias=bias, sink_H=sink_H)
            out_NHV[group.targets_n] = out_STHV[group.kept_ST]
        return out_NHV

    def tensor(self, array: np.ndarray) -> Tensor:
        """Indices on the cache's device."""
        return torch.from_numpy(array.astype(np.int64)).to(self.cache.device)

    def _choose_slots(self) -> None:
        """A ring takes a sequence's last tokens, as many as it has slots: each slot is written once."""
        num_slots = self.cache.ring_k_RLCGK.shape[2]
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
        starts_S1 = self.starts_S[members_S][:, None]
        positions_ST = starts_S1 + steps_ST
        num_slots = self.cache.ring_k_RLCGK.shape[2]
        # The newest position before this pass that is congruent to the slot; what a rejected draft left is further
        # back than any window.
        old_SC = starts_S1 - 1 - (starts_S1 - 1 - np.arange(num_slots)) % num_slots
        keys_SC = np.concatenate((old_SC, np.where(kept_ST, positions_ST, -1)), axis=1)
        pages_SP = None if self.page_tables is None else self._pages(members_S)
        page_bias = None
        if pages_SP is not None:
            page_bias = self._bias(positions_ST, np.arange(pages_SP.shape[1] * PAGE_TOKENS)[None], None)
        return _Group(
            rows_S=self.tensor(self.rows_S[members_S]),
            places_ST=self.tensor(places_ST),
            kept_ST=torch.from_numpy(kept_ST).to(self.cache.device),
            targets_n=self.tensor(places_ST[kept_ST]),
            ring_bias=self._bias(positions_ST, keys_SC, self.config.sliding_attention.window_keys),
            page_bias=page_bias,
            pages_SP=None if pages_SP is None else self.tensor(pages_SP),
        )

    def _pages(self, members_S: np.ndarray) -> np.ndarray:
        """The members' page tables, padded with page 0, whose keys lie behind every query."""
        assert self.page_tables is not None
        counts = [-(-int(self.starts_S[m] + self.counts_S[m]) // PAGE_TOKENS) for m in members_S]
        pages_SP = np.zeros((len(members_S), max(counts)), dtype=np.int64)
        for place, (member, count) in enumerate(zip(members_S, counts, strict=True)):
            pages_SP[place, :count] = self.page_tables[member][:count]
        return pages_SP

    def _bias(self, positions_ST: np.ndarray, keys_SC: np.ndarray, window_keys: int | None) -> Tensor:
        """0 where the key is at or before the query (and in its window), minus infinity elsewhere. Shape (S, T, C)."""
        distance_STC = positions_ST[:, :, None] - keys_SC[:, None, :]
        visible_STC = (distance_STC >= 0) & (keys_SC[:, None, :] >= 0)
        if window_keys is not None:
            visible_STC &= distance_STC < window_keys
        bias = np.where(visible_STC, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(bias).to(self.cache.device, self.cache.dtype)

    def _plan(self, kind: AttentionKind) -> AttentionPlan:
        theta = self.config.attention(kind).rope_theta
        cos, sin = rotary_tables(self.tensor(self.positions_N)[None], self.config.rotary_dim(kind), theta)
        return AttentionPlan(kind, cos, sin, None)
