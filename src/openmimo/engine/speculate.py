"""Drafting with the MTP heads, and the rule that verifies drafts.

Head k at position i sees h_i and token i + 1 + k. When the newest token is the one at position p, the hidden states
end at p - 1, so at its last k positions head k has to take drafts of the earlier heads for tokens that do not exist
yet, and its cache entries there are provisional. Each pass therefore runs every head over the last `window_tokens`
positions: at least all tokens of the last step and the K - 1 before them, which replaces every provisional entry by
one made of the true tokens. What a head sees while drafting is then exactly what it would see in a forward pass over
the text so far followed by the drafts.

Suffixes: B batch, T tokens of a step, W positions of a head pass, D hidden, K drafts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openmimo.config.model import AttentionKind
from openmimo.model import Cache, MiMoModel, ModelOutput
from openmimo.model.attention import make_cached_plans


def window_tokens(num_drafts: int) -> int:
    """Positions in a head pass: the most that one step commits (K + 1), and K - 1 with provisional entries."""
    return max(1, 2 * num_drafts)


def count_kept(window_BT: Tensor, choices_BT: Tensor, num_drafts: int) -> Tensor:
    """How many tokens each row emits: the drafts up to the first that differs from the model's choice, plus one.

    Draft j stands at `window_BT[:, j + 1]` and is judged by the choice at j. Shape (B,), from 1 to `num_drafts` + 1.
    """
    right_BK = window_BT[:, 1 : num_drafts + 1] == choices_BT[:, :num_drafts]
    return right_BK.long().cumprod(1).sum(1) + 1


class Drafter:
    """The recent hidden states and tokens of a batch, and the head passes over them.

    `hidden_BWD` holds the last W committed positions, `tokens_BW` the tokens at those positions. In a shorter row the
    first places stand for negative positions: what they hold is finite, and no query sees their keys.
    """

    def __init__(self, model: MiMoModel, *, num_drafts: int, batch_size: int) -> None:
        self.model = model
        self.num_drafts = num_drafts
        self.num_positions = window_tokens(num_drafts)
        embedding = model.embed_tokens.weight
        shape = (batch_size, self.num_positions)
        self.hidden_BWD = embedding.new_zeros(*shape, model.config.hidden_size)
        self.tokens_BW = torch.zeros(shape, dtype=torch.int64, device=embedding.device)

    def prefill(self, row: int, output: ModelOutput, cache: Cache) -> None:
        """Run the heads over a whole prompt. Entries that need tokens after the prompt are left to `draft`."""
        tokens_BT, keep = output.token_ids_BT, min(self.num_positions, output.token_ids_BT.shape[1])
        plan = output.plans[AttentionKind.SLIDING]
        for head in range(self.num_drafts):
            next_ids_BT = tokens_BT.roll(-(head + 1), dims=1)
            self.model.mtp_forward(head, output.hidden_BTD, next_ids_BT, plan, cache)
        self.hidden_BWD[row, -keep:] = output.hidden_BTD[0, -keep:]
        self.tokens_BW[row, -keep:] = tokens_BT[0, -keep:]

    def draft(self, last_B: Tensor, cache: Cache) -> Tensor:
        """The heads' greedy proposals for the tokens after `last_B`, shape (B, K). The cache's length stays.

        `last_B` is the newest token of each row: chosen, not yet fed.
        """
        width = self.num_positions
        cache.truncate(cache.length_B - width)
        positions_BW = cache.begin_step(width)
        plan = make_cached_plans(self.model.config, positions_BW, cache, self.hidden_BWD.dtype)[AttentionKind.SLIDING]
        cache.commit(width)
        tokens_BT = torch.cat((self.tokens_BW[:, 1:], last_B[:, None]), dim=1)
        for head in range(self.num_drafts):
            next_ids_BW = tokens_BT[:, head : head + width]
            out_BWD = self.model.mtp_forward(head, self.hidden_BWD, next_ids_BW, plan, cache)
            draft_B1 = self.model.lm_head(out_BWD[:, -1:]).argmax(-1)
            tokens_BT = torch.cat((tokens_BT, draft_B1), dim=1)
        return tokens_BT[:, width:]

    def advance(self, window_BT: Tensor, hidden_BTD: Tensor, num_tokens_B: Tensor) -> None:
        """Append the first `num_tokens_B` positions of a verified window to the history."""
        index_BW = num_tokens_B[:, None] + torch.arange(self.num_positions, device=num_tokens_B.device)
        rows_B1 = torch.arange(index_BW.shape[0], device=index_BW.device)[:, None]
        self.hidden_BWD = torch.cat((self.hidden_BWD, hidden_BTD), dim=1)[rows_B1, index_BW]
        self.tokens_BW = torch.cat((self.tokens_BW, window_BT), dim=1)[rows_B1, index_BW]
