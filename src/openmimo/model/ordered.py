"""Attention whose bits do not depend on where keys are kept, what is masked, or what else is computed.

Keys come in the order of their positions and a masked key has probability 0. Sums over keys are products of
`kernels.invariant`, which zeros before, between and behind do not change: so a ring, pages, a chunk of a prompt and a
document among others in a training row give a query the same bits.

Suffixes: B rows, T tokens, N blocks of Q queries each, C keys of a block in order, S kept keys, H query heads, G
key/value heads, K QK dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openmimo.errors import ShapeError
from openmimo.kernels import invariant

# Queries of a document that attend together.
BLOCK_QUERIES = 64
# Scores per head of the blocks that are computed at once, in elements.
SLICE_SCORES = 1 << 19


@dataclass(frozen=True)
class OrderedKeys:
    """For N sequences with Q queries each: which kept keys they see, in the order of positions.

    `slots_NC` are places among a sequence's kept keys. A place that nobody sees may name any of them.
    """

    slots_NC: Tensor
    visible_NQC: Tensor

    def attend(self, q_NQHK: Tensor, k_NSGK: Tensor, v_NSGV: Tensor, sink_H: Tensor | None) -> Tensor:
        """Shapes: -> (N, Q, H, V)."""
        num_rows, num_slots = k_NSGK.shape[:2]
        places_NC = self.slots_NC + num_slots * torch.arange(num_rows, device=k_NSGK.device)[:, None]
        keys, values = (_take(x.flatten(0, 1), places_NC) for x in (k_NSGK, v_NSGV))
        return attend_in_order(q_NQHK, keys, values, self.visible_NQC, sink_H)


def order_keys(positions_NQ: Tensor, key_positions_NS: Tensor, window_keys: int | None) -> OrderedKeys:
    """Find each position's slot; `key_positions_NS` has the position in every slot, negative where there is none."""
    last_N = positions_NQ.amax(1)
    begin_N = torch.zeros_like(last_N)
    if window_keys is not None:
        begin_N = (positions_NQ.amin(1) - window_keys + 1).clamp(min=0)
    size = int((last_N - begin_N).max()) + 1
    places_NS = key_positions_NS - begin_N[:, None]
    held_NS = (key_positions_NS >= 0) & (places_NS >= 0) & (key_positions_NS <= last_N[:, None])
    # What is not held goes to one more place, which is cut off.
    slots_NC = torch.full((len(last_N), size + 1), -1, device=last_N.device)
    all_slots_NS = torch.arange(key_positions_NS.shape[1], device=last_N.device).expand_as(key_positions_NS)
    slots_NC.scatter_(1, torch.where(held_NS, places_NS, size), all_slots_NS)
    slots_NC = slots_NC[:, :size]
    ordered_NC = begin_N[:, None] + torch.arange(size, device=last_N.device)
    visible_NQC = _visible(positions_NQ, ordered_NC, window_keys) & (slots_NC >= 0)[:, None]
    return OrderedKeys(slots_NC.clamp(min=0), visible_NQC)


class _Batch(NamedTuple):
    """Blocks that are computed at once. `queries_NQ` and `keys_NC` are flat places; `kept_NQ` is false on padding."""

    queries_NQ: Tensor
    kept_NQ: Tensor
    keys_NC: Tensor
    visible_NQC: Tensor


class PackedDocuments:
    """Attention within the documents of packed rows: a document is a run of equal ids within a row.

    Raises: ShapeError if positions do not count up by one within a document.
    """

    def __init__(self, position_ids_BT: Tensor, document_ids_BT: Tensor | None, window_keys: int | None) -> None:
        positions = position_ids_BT.cpu().numpy()
        ids = np.zeros_like(positions) if document_ids_BT is None else document_ids_BT.cpu().numpy()
        blocks = sorted(_blocks(positions, ids, window_keys), key=lambda block: block.num_keys)
        device = position_ids_BT.device
        self.batches = [_join(batch, window_keys, device) for batch in _slices(blocks)]
        targets = torch.cat([batch.queries_NQ[batch.kept_NQ] for batch in self.batches])
        self.order_N = torch.empty_like(targets).scatter_(0, targets, torch.arange(len(targets), device=device))

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, sink_H: Tensor | None) -> Tensor:
        """Shapes: -> (B, T, H, V)."""
        q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGV))
        outputs: list[Tensor] = []
        for queries_NQ, kept_NQ, keys_NC, visible_NQC in self.batches:
            keys, values = _take(k, keys_NC), _take(v, keys_NC)
            out_NQHV = attend_in_order(_take(q, queries_NQ), keys, values, visible_NQC, sink_H)
            outputs.append(out_NQHV[kept_NQ])
        return torch.cat(outputs).index_select(0, self.order_N).unflatten(0, q_BTHK.shape[:2])


class _Block(NamedTuple):
    """Queries at flat places from `query` on, at positions from `position` on, and keys from position `begin` on."""

    query: int
    num_queries: int
    position: int
    begin: int

    @property
    def num_keys(self) -> int:
        return self.position + self.num_queries - self.begin


def _blocks(positions_BT: np.ndarray, ids_BT: np.ndarray, window_keys: int | None) -> Iterator[_Block]:
    num_tokens = ids_BT.shape[1]
    for row, (positions_T, ids_T) in enumerate(zip(positions_BT, ids_BT, strict=True)):
        starts = np.flatnonzero(np.diff(ids_T, prepend=ids_T[0] - 1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), num_tokens], strict=True):
            first = int(positions_T[start])
            if first < 0 or (np.diff(positions_T[start:end]) != 1).any():
                raise ShapeError("an invariant pass needs positions that count up by one within each document")
            for query in range(start, end, BLOCK_QUERIES):
                position = first + query - start
                begin = first if window_keys is None else max(first, position - window_keys + 1)
                yield _Block(row * num_tokens + query, min(BLOCK_QUERIES, end - query), position, begin)


def _slices(blocks: list[_Block]) -> Iterator[list[_Block]]:
    """Blocks of about one size together, as many as SLICE_SCORES allows."""
    batch: list[_Block] = []
    for block in blocks:
        too_many = (len(batch) + 1) * BLOCK_QUERIES * block.num_keys > SLICE_SCORES
        if batch and (too_many or block.num_keys > 2 * batch[0].num_keys + BLOCK_QUERIES):
            yield batch
            batch = []
        batch.append(block)
    yield batch


def _join(blocks: list[_Block], window_keys: int | None, device: torch.device) -> _Batch:
    query, num_queries, position, begin = (
        torch.tensor(column, device=device)[:, None] for column in zip(*blocks, strict=True)
    )
    steps_Q = torch.arange(int(num_queries.max()), device=device)
    kept_NQ = steps_Q < num_queries
    steps_NQ = torch.minimum(steps_Q, num_queries - 1)  # short blocks repeat their last query
    positions_NQ = position + steps_NQ
    ordered_NC = begin + torch.arange(max(block.num_keys for block in blocks), device=device)
    # Places behind the last query take its key: nobody sees them, and any of the same document will do.
    keys_NC = query + torch.minimum(ordered_NC, position + num_queries - 1) - position
    return _Batch(query + steps_NQ, kept_NQ, keys_NC, _visible(positions_NQ, ordered_NC, window_keys))


def _take(x_SHK: Tensor, places_NC: Tensor) -> Tensor:
    """Shapes: -> (N, C, H, K)."""
    return x_SHK.index_select(0, places_NC.flatten()).unflatten(0, places_NC.shape)


def _visible(positions_NQ: Tensor, ordered_NC: Tensor, window_keys: int | None) -> Tensor:
    distance_NQC = positions_NQ[:, :, None] - ordered_NC[:, None, :]
    visible_NQC = distance_NQC >= 0
    return visible_NQC if window_keys is None else visible_NQC & (distance_NQC < window_keys)


def attend_in_order(
    q_NQHK: Tensor, k_NCGK: Tensor, v_NCGV: Tensor, visible_NQC: Tensor, sink_H: Tensor | None
) -> Tensor:
    """Softmax attention to the visible keys, which are in the order of their positions without gaps.

    The sink adds exp(sink) to the denominator, behind all keys. Shapes: -> (N, Q, H, V).
    """
    num_blocks, num_queries, num_heads, dim = q_NQHK.shape
    num_groups, hidden_N11QC = k_NCGK.shape[2], ~visible_NQC[:, None, None]
    q = q_NQHK.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4).reshape(num_blocks * num_groups, -1, dim)
    scores = invariant.batched_product(q, k_NCGK.transpose(1, 2).flatten(0, 1)) * dim**-0.5
    scores_NGRQC = scores.unflatten(0, (num_blocks, num_groups)).unflatten(2, (-1, num_queries))
    scores_NGRQC = scores_NGRQC.masked_fill(hidden_N11QC, float("-inf"))
    top_NGRQ1 = scores_NGRQC.detach().amax(-1, keepdim=True)
    sink_GR11 = None if sink_H is None else sink_H.view(num_groups, num_heads // num_groups, 1, 1)
    if sink_GR11 is not None:
        top_NGRQ1 = torch.maximum(top_NGRQ1, sink_GR11.detach())
    weights_NGRQC = invariant.exponential(scores_NGRQC - top_NGRQ1).masked_fill(hidden_N11QC, 0.0)
    total_NGRQ1 = invariant.total(weights_NGRQC)
    if sink_GR11 is not None:
        total_NGRQ1 = total_NGRQ1 + invariant.exponential(sink_GR11 - top_NGRQ1)
    weights = weights_NGRQC.flatten(2, 3).flatten(0, 1)
    out = invariant.batched_product(weights, v_NCGV.permute(0, 2, 3, 1).flatten(0, 1))
    out_NGRQV = out.view(num_blocks, num_groups, -1, num_queries, v_NCGV.shape[-1]) / total_NGRQ1
    return out_NGRQV.permute(0, 3, 1, 2, 4).flatten(2, 3)
