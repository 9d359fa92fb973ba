"""Which keys a query sees: additive masks, and first keys and holes for the fused kernel.

Suffixes: B batch, T queries, S keys, C tokens per block, N number of blocks, L keys that one block can see.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The sink's key is padded to a multiple that matrix products like; the other columns are masked.
SINK_COLUMNS = 8
# Packed global layers run this many queries at a time, each block against the keys up to its own end.
ROW_BLOCK = 128


def window_bias(document_ids_BT: Tensor, window_keys: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The additive mask of `attend_window`, one tile per block, shared by all sliding layers.

    A key is visible when it lies in the same document, at or before the query, fewer than `window_keys` back.
    Documents are compared by id *and* row, so equal ids in two rows stay apart.
    Shapes: -> (N, C, L) and the block size C.   Cost: O(B*T*L) bytes once per batch.
    """
    batch, num_tokens = document_ids_BT.shape
    block = min(64, max(8, 1 << (window_keys - 1).bit_length()))
    num_back = math.ceil((window_keys - 1) / block)
    device = document_ids_BT.device
    rows_B1 = torch.arange(batch, device=device)[:, None]
    # Distinct id per (row, document), however large; padding keeps its own so that every query sees at least itself.
    flat = ((document_ids_BT.to(torch.int64) + 1) * batch + rows_B1).flatten()
    num_blocks = math.ceil(batch * num_tokens / block)
    flat = F.pad(flat, (num_back * block, num_blocks * block - batch * num_tokens), value=-1)
    ids = flat.unflatten(0, (num_blocks + num_back, block))
    key_ids_NL = torch.cat([ids[i : i + num_blocks] for i in range(num_back + 1)], dim=1)
    query_ids_NC = ids[num_back:]
    query_offset_C1 = torch.arange(block, device=device)[:, None] + num_back * block
    distance_CL = query_offset_C1 - torch.arange((num_back + 1) * block, device=device)[None, :]
    in_window_CL = (distance_CL >= 0) & (distance_CL < window_keys)
    visible_NCL = (query_ids_NC[:, :, None] == key_ids_NL[:, None, :]) & in_window_CL
    return additive_mask(visible_NCL, dtype), block


def causal_biases(document_ids_BT: Tensor, dtype: torch.dtype, *, sink: bool) -> tuple[Tensor, ...]:
    """The additive masks of global layers on packed rows: same document, at or before the query.

    Shapes: one (B, C, end of the block) per block of up to ROW_BLOCK queries, plus the sink's columns.
    """
    num_tokens = document_ids_BT.shape[1]
    positions_T = torch.arange(num_tokens, device=document_ids_BT.device)
    biases: list[Tensor] = []
    for start in range(0, num_tokens, ROW_BLOCK):
        end = min(start + ROW_BLOCK, num_tokens)
        same_BCS = document_ids_BT[:, start:end, None] == document_ids_BT[:, None, :end]
        bias_BCS = additive_mask(same_BCS & (positions_T[start:end, None] >= positions_T[:end]), dtype)
        biases.append(with_sink_columns(bias_BCS) if sink else bias_BCS)
    return tuple(biases)


def branch_biases(
    document_ids_BT: Tensor,
    branch_ids_BT: Tensor,
    position_ids_BT: Tensor,
    window_keys: int | None,
    dtype: torch.dtype,
    *,
    sink: bool,
) -> tuple[Tensor, ...]:
    """`causal_biases` for documents that branch: a query sees its own branch and branch 0, the documents' beginning.

    Distances are those of positions, for branches lie one behind the other. The readable twin of `visible_keys`.
    """
    num_tokens = document_ids_BT.shape[1]
    biases: list[Tensor] = []
    for start in range(0, num_tokens, ROW_BLOCK):
        end = min(start + ROW_BLOCK, num_tokens)
        keys_B1S, queries_BC1 = (slice(None), None, slice(0, end)), (slice(None), slice(start, end), None)
        distance_BCS = position_ids_BT[queries_BC1] - position_ids_BT[keys_B1S]
        visible_BCS = (document_ids_BT[queries_BC1] == document_ids_BT[keys_B1S]) & (distance_BCS >= 0)
        visible_BCS &= (branch_ids_BT[keys_B1S] == 0) | (branch_ids_BT[queries_BC1] == branch_ids_BT[keys_B1S])
        if window_keys is not None:
            visible_BCS &= distance_BCS < window_keys
        bias_BCS = additive_mask(visible_BCS, dtype)
        biases.append(with_sink_columns(bias_BCS) if sink else bias_BCS)
    return tuple(biases)


def visible_keys(
    document_ids_BT: Tensor, branch_ids_BT: Tensor | None, window_keys: int | None
) -> tuple[Tensor, Tensor | None]:
    """The first key that each query sees, and the hole between it and the query. Shapes: -> (B, T), (B, T, 2), int32.

    A document is a run of equal ids within a row; it may branch (`MiMoModel.forward`). The hole of a query in a later
    branch is what lies between the shared beginning and its branch. Without branches there are no holes.
    """
    num_tokens = document_ids_BT.shape[1]
    places_T = torch.arange(num_tokens, device=document_ids_BT.device)
    window_keys = num_tokens if window_keys is None else window_keys

    def last(marks_BT: Tensor) -> Tensor:
        """The last marked place at or before each."""
        return torch.where(marks_BT, places_T, 0).cummax(dim=1).values

    begins_BT = F.pad(document_ids_BT[:, 1:] != document_ids_BT[:, :-1], (1, 0), value=True)
    start_BT = last(begins_BT)
    if branch_ids_BT is None:
        return torch.maximum(start_BT, places_T - window_keys + 1).to(torch.int32), None
    changes_BT = F.pad(branch_ids_BT[:, 1:] != branch_ids_BT[:, :-1], (1, 0)) | begins_BT
    branch_BT = last(changes_BT)
    ends_shared_BT = changes_BT & F.pad(branch_ids_BT[:, :-1] == 0, (1, 0)) & ~begins_BT
    # What the window has room for beyond the branch's own keys lies at the end of the shared ones.
    beyond_BT = window_keys - (places_T - branch_BT + 1)
    shared_end_BT = last(ends_shared_BT)
    sees_shared_BT = (branch_ids_BT != 0) & (beyond_BT > 0)
    in_shared_BT = torch.maximum(start_BT, shared_end_BT - beyond_BT)
    in_branch_BT = torch.maximum(branch_BT, places_T - window_keys + 1)
    first_BT = torch.where(sees_shared_BT, in_shared_BT, in_branch_BT)
    hole_BT2 = torch.stack([shared_end_BT, branch_BT], dim=2) * sees_shared_BT[:, :, None]
    return first_BT.to(torch.int32), hole_BT2.to(torch.int32)


def with_sink_columns(bias: Tensor) -> Tensor:
    """Append the sink's column (visible) and its padding (masked) to an additive mask."""
    return F.pad(F.pad(bias, (0, 1)), (0, SINK_COLUMNS - 1), value=float("-inf"))


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is visible, minus infinity elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
