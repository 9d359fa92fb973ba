"""The seam between the engine and whatever computes: one `Runner` holds weights and caches, all arrays are numpy.

Sliding layers and MTP heads keep one ring per sequence, in a *row*; global layers keep *pages* of PAGE_TOKENS
positions: position x of a sequence lies in page `page_table[x // PAGE_TOKENS]` at slot x % PAGE_TOKENS of every global
layer. The engine hands out rows and pages and counts who holds them; a runner only reads and writes where it is told.

One step: `forward`, then `prefill_heads` for the sequences that are still in their prompt, then `commit`, then `draft`.

Suffixes: S sequences of a step, N flat tokens of a step (sequence after sequence), M wanted rows of logits,
V vocabulary, L sparse layers, k chosen experts, K MTP heads, W = 2K positions of a head pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from openmimo.config.model import ModelConfig

if TYPE_CHECKING:
    from openmimo.model import MiMoModel

PAGE_TOKENS = 64

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Routes = npt.NDArray[np.uint8 | np.uint16]


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """Tokens to feed. Arrays may be views of buffers that the engine uses again after the call.

    `starts_S` is the position of each sequence's first token of this step, which is the number of tokens kept in its
    cache. `page_tables[s]` has pages for at least `starts_S[s] + counts_S[s]` positions. `logits_M` are the flat
    places whose logits are wanted, ascending; there may be none.
    """

    token_ids_N: Int32
    rows_S: Int32
    starts_S: Int32
    counts_S: Int32
    page_tables: tuple[Int32, ...]
    logits_M: Int32


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a forward pass gave; both arrays belong to the caller until the next `forward`, who may overwrite them.

    Routes are uint16 above 256 experts, and have shape (N, 0, 0) in a model without sparse layers.
    """

    logits_MV: Float32
    routed_experts_NLk: Routes


@dataclass(frozen=True)
class RowState:
    """A row's rings and hidden states, copied out. Only the runner that made it knows what the arrays mean."""

    arrays: tuple[npt.NDArray[Any], ...]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Runner(Protocol):
    """A model ready to decode. Not safe to call from two threads at once.

    A ring has at least `window_keys` + K slots (heads: `window_keys` - 1 + 2K), so that up to K + 1 positions at its
    end can be taken back and written again. Rows and pages need no clearing when they are given to another
    sequence: a runner forgets a row at position 0 and a page at its first, because what is only masked must be finite.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def max_step_tokens(self) -> int:
        """The most tokens N that one `forward` takes."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: keys and values in the rings of sliding layers and heads."""
        ...

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of PAGE_TOKENS positions in all global layers."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of all rows and pages."""
        ...

    def load_weights(self, model: MiMoModel) -> None:
        """Compute with a model's weights from now on, in the runner's format; caches stay as they are."""
        ...

    def forward(self, step: StepInput) -> StepOutput:
        """Run the main model; write keys and values of all tokens; remember each sequence's hidden states."""
        ...

    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        """Run the heads over `counts_S[s]` positions from `starts_S[s]` on, for sequences of the last forward.

        Called before `commit`. `next_ids[s]` are the ids at positions `starts_S[s]` + 1, + 2, ... as far as they are
        known: head k at position i takes the one at i + 1 + k, and skips positions whose id is not there. A start may
        lie up to 2K positions before the forward's own start (a sequence that goes on from a snapshot, whose last
        positions lacked their next ids): those hidden states come from the row's history.
        """
        ...

    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        """Of the last forward's tokens the first `kept_S` of each sequence stay.

        Their hidden states go into the row's history, which holds the last 2K kept positions. Rows of the last forward
        that are not named keep nothing.
        """
        ...

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        """The heads' greedy proposals for the K tokens after the newest, shape (S, K).

        `lengths_S` counts the kept tokens in the cache, so hidden states are known up to position length - 1.
        `tokens_SW` holds the ids at positions length - W + 1 to length, the last being the newest token (chosen, not
        yet fed), and 0 before position 0. Every head runs over positions length - W to length - 1 (from 0 on) and
        takes the earlier heads' proposals where the text has no id yet; those entries are written again by the next
        call. If more than K + 1 tokens were kept since the last call, the positions between stay as they were.
        """
        ...

    def copy_page(self, source: int, target: int) -> None: ...

    def copy_row(self, source: int, target: int) -> None:
        """Rings and history."""
        ...

    def read_row(self, row: int) -> RowState: ...

    def write_row(self, row: int, state: RowState) -> None: ...
