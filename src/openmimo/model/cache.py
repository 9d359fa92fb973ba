"""The decoding cache: a ring per sliding layer, growing pages per global layer.

A ring holds `window_keys - 1` old keys plus `step_tokens` slots for the tokens of one step (drafts
included), so a rejected draft never overwrites a key that is still needed. Position p lives in slot p modulo the
ring size, in pages at slot p. Layers write and read; only the caller moves `length_B`.

Suffixes: B batch, T new tokens, S slots, G key/value heads, K QK dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmimo.config.model import AttentionConfig, AttentionKind, ModelConfig
from openmimo.errors import ShapeError

PAGE_TOKENS = 64


class LayerCache:
    """Keys and values of one layer: a ring when the geometry has a window, pages otherwise."""

    def __init__(
        self, geometry: AttentionConfig, batch: int, step_tokens: int, dtype: torch.dtype, device: torch.device
    ):
        self.geometry = geometry
        self.is_ring = geometry.window_keys is not None
        slots = geometry.window_keys - 1 + step_tokens if geometry.window_keys is not None else 0
        self.k_BSGK = torch.zeros(batch, slots, geometry.num_kv_heads, geometry.qk_head_dim, dtype=dtype, device=device)
        self.v_BSGV = torch.zeros(batch, slots, geometry.num_kv_heads, geometry.v_head_dim, dtype=dtype, device=device)
        self.slots_BT: Tensor | None = None

    @property
    def num_slots(self) -> int:
        return self.k_BSGK.shape[1]

    def reserve(self, num_tokens: int) -> None:
        """Grow pages until `num_tokens` positions fit; rings never grow."""
        missing = 0 if self.is_ring else num_tokens - self.num_slots
        if missing > 0:
            extra = -(-missing // PAGE_TOKENS) * PAGE_TOKENS
            self.k_BSGK = torch.cat((self.k_BSGK, _empty_like(self.k_BSGK, extra)), dim=1)
            self.v_BSGV = torch.cat((self.v_BSGV, _empty_like(self.v_BSGV, extra)), dim=1)

    def write(self, k_BTGK: Tensor, v_BTGV: Tensor) -> None:
        """Store the new tokens in the slots chosen by `Cache.begin_step`; a ring keeps the last that fit."""
        assert self.slots_BT is not None
        keep = self.slots_BT.shape[1]
        rows_B1 = torch.arange(k_BTGK.shape[0], device=k_BTGK.device)[:, None]
        self.k_BSGK[rows_B1, self.slots_BT] = k_BTGK[:, -keep:].detach().to(self.k_BSGK.dtype)
        self.v_BSGV[rows_B1, self.slots_BT] = v_BTGV[:, -keep:].detach().to(self.v_BSGV.dtype)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.k_BSGK, self.v_BSGV

    @property
    def num_bytes(self) -> int:
        return self.k_BSGK.nbytes + self.v_BSGV.nbytes


class Cache:
    """All layers' caches of one batch, and how many tokens each sequence has committed.

    `step_tokens` is the most tokens that one step on a non-empty cache may add (1 + drafts).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        step_tokens: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        where = torch.device(device)
        sliding = config.sliding_attention
        self.config = config
        self.batch_size = batch_size
        self.step_tokens = step_tokens
        self.layers = [
            LayerCache(config.attention(kind), batch_size, step_tokens, dtype, where) for kind in config.layer_kinds
        ]
        self.mtp_heads = [
            LayerCache(sliding, batch_size, step_tokens, dtype, where) for _ in range(config.num_mtp_heads)
        ]
        self.length_B = torch.zeros(batch_size, dtype=torch.int64, device=where)
        self.is_empty = True
        self._last_B = self.length_B - 1
        self._fewest_kept = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values held, MTP heads included."""
        return sum(layer.num_bytes for layer in (*self.layers, *self.mtp_heads))

    def begin_step(self, num_tokens: int) -> Tensor:
        """Choose slots for `num_tokens` new tokens per sequence and return their positions, shape (B, T).

        Raises: ShapeError if a non-empty cache is given more than `step_tokens` at once.
        """
        if not self.is_empty and num_tokens > self.step_tokens:
            raise ShapeError(
                f"{num_tokens} tokens in one step on a cache made for {self.step_tokens}; "
                "feed them in smaller steps or make the cache with a larger step_tokens"
            )
        positions_BT = self.length_B[:, None] + torch.arange(num_tokens, device=self.length_B.device)
        self._last_B = positions_BT[:, -1]
        wraps = any(layer.is_ring and num_tokens > layer.num_slots for layer in (*self.layers, *self.mtp_heads))
        self._fewest_kept = num_tokens - self.step_tokens if wraps else 0
        most = int(self._last_B.max()) + 1
        for layer in (*self.layers, *self.mtp_heads):
            layer.reserve(most)
            layer.slots_BT = positions_BT[:, -layer.num_slots :] % layer.num_slots if layer.is_ring else positions_BT
        return positions_BT

    def commit(self, num_tokens_B: Tensor | int) -> None:
        """Keep the first `num_tokens_B` of the tokens written by the step; the others are forgotten.

        Raises: ShapeError if a prompt longer than a ring keeps so few that the ring no longer has their keys.
        """
        if self._fewest_kept > 0 and bool((torch.as_tensor(num_tokens_B) < self._fewest_kept).any()):
            raise ShapeError(
                f"at least {self._fewest_kept} tokens of this step must be kept, as a ring has dropped the keys before "
                "them; run shorter prompts apart and use copy_row, or make the cache with a larger step_tokens"
            )
        self.length_B = self.length_B + num_tokens_B
        self.is_empty = False

    def key_positions(self, kind: AttentionKind) -> Tensor:
        """The position that each slot of a layer of this kind holds during the step, -1 for none. Shape (B, S)."""
        layers = [layer for layer, k in zip(self.layers, self.config.layer_kinds, strict=True) if k is kind]
        if kind is AttentionKind.SLIDING:
            layers += self.mtp_heads
        num_slots = layers[0].num_slots if layers else 1
        slots_S = torch.arange(num_slots, device=self.length_B.device)
        if kind is AttentionKind.GLOBAL:
            return torch.where(slots_S <= self._last_B[:, None], slots_S, -1)
        # The newest position that is congruent to the slot; anything a rejected draft left is out of the window.
        positions_BS = self._last_B[:, None] - (self._last_B[:, None] - slots_S) % num_slots
        return positions_BS.clamp(min=-1)

    def truncate(self, length: int | Tensor) -> None:
        """Forget tokens from `length` on; at most `step_tokens` may be forgotten on sliding layers."""
        target_B = torch.as_tensor(length, device=self.length_B.device).expand_as(self.length_B)
        if bool((target_B > self.length_B).any()):
            raise ShapeError(
                f"cannot truncate to {int(target_B.max())} tokens: the cache holds {self.length_B.tolist()}"
            )
        if bool((self.length_B - target_B > self.step_tokens).any()):
            raise ShapeError(f"a ring can forget at most its last {self.step_tokens} tokens; rebuild the cache instead")
        self.length_B = target_B.clone()

    def copy_row(self, row: int, source: Cache) -> None:
        """Put the single sequence of `source` into row `row`; both caches need the same geometry."""
        for mine, theirs in zip((*self.layers, *self.mtp_heads), (*source.layers, *source.mtp_heads), strict=True):
            mine.reserve(theirs.num_slots)
            mine.k_BSGK[row, : theirs.num_slots] = theirs.k_BSGK[0]
            mine.v_BSGV[row, : theirs.num_slots] = theirs.v_BSGV[0]
        self.length_B[row] = source.length_B[0]
        self.is_empty = False


def _empty_like(x_BSGK: Tensor, slots: int) -> Tensor:
    # Zeros, not garbage: masked slots are still multiplied by a probability of 0, and 0 * NaN is NaN.
    return torch.zeros(x_BSGK.shape[0], slots, *x_BSGK.shape[2:], dtype=x_BSGK.dtype, device=x_BSGK.device)
