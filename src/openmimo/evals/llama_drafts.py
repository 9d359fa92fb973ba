"""Greedy decoding with llama.cpp, alone or with drafts from the model's MTP heads.

llama.cpp's own driver chains the heads: it feeds head k the hidden state that head k - 1 made, and token i + 1 to
every head. MiMo's heads all take the main model's h_i, and head k the token i + 1 + k. This driver feeds them that,
so that the peer drafts as well as the weights allow. Every pass of a head covers the last positions again, as in
`engine.runner`, because the entries made from drafts are provisional.

Suffixes: N tokens of a pass, W positions of a head pass, D hidden.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from openmimo.engine.request import DraftStats
from openmimo.errors import RequestError
from openmimo.evals.llama_cpp import ContextOptions, Floats, LlamaContext, LlamaModel


class HeadContext(LlamaContext):
    """The caches of a model's MTP heads, behind a context of its main layers."""

    def __init__(self, main: LlamaContext, *, num_tokens: int, threads: int, options: ContextOptions) -> None:
        super().__init__(main.model, num_tokens=num_tokens, threads=threads, options=options, heads_of=main)
        self.extension: Any = importlib.import_module("llama_cpp.llama_cpp_ext")
        self.extended: Any = self.library.llama_batch_ext_init(self.handle)

    def feed_head(self, head: int, token_ids: Sequence[int], hidden_ND: Floats, start: int) -> None:
        """Run one head over the positions from `start` on, replacing what it holds there; logits for the last."""
        library, batch = self.library, self.extended
        self.truncate(0, start)
        self.extension.llama_set_nextn_layer_offset(self.handle, head)
        hidden_ND = np.ascontiguousarray(hidden_ND, dtype=np.float32)
        for first in range(0, len(token_ids), self.MAX_FEED):
            library.llama_batch_ext_clear(batch)
            chunk = token_ids[first : first + self.MAX_FEED]
            for place, token in enumerate(chunk):
                row = hidden_ND[first + place]
                embedding = library.llama_embd(row.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), 1, len(row))
                library.llama_batch_ext_add_token(batch, 0, token)
                library.llama_batch_ext_set_pos(batch, place, ctypes.byref(library.llama_pos(start + first + place)))
                library.llama_batch_ext_set_embd_token(batch, place, embedding)
                library.llama_batch_ext_set_output_logits(batch, place, first + place == len(token_ids) - 1)
            status = library.llama_process(self.handle, library.LLAMA_PROCESS_TYPE_DECODE, batch)
            if status != 0:
                raise RequestError(f"llama_process returned {status} in MTP head {head}; make a larger context")

    def close(self) -> None:
        if self.handle:
            self.library.llama_batch_ext_free(self.extended)
        super().close()


class LlamaDrafter:
    """One sequence that is decoded greedily, with `num_drafts` heads (0: none)."""

    def __init__(
        self, model: LlamaModel, *, num_tokens: int, num_drafts: int, threads: int, options: ContextOptions
    ) -> None:
        if num_drafts > model.num_mtp_heads:
            raise RequestError(f"num_drafts={num_drafts}, but the file gives {model.num_mtp_heads} MTP heads")
        room = num_tokens + num_drafts + 1
        self.main = LlamaContext(model, num_tokens=room, threads=threads, options=options)
        self.num_drafts = num_drafts
        self.heads: HeadContext | None = None
        if num_drafts:
            self.heads = HeadContext(self.main, num_tokens=room, threads=threads, options=options)
            self.extension: Any = self.heads.extension
            self.extension.llama_set_embeddings_nextn(self.main.handle, True, False)

    def generate(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], DraftStats]:
        """Continue a prompt greedily."""
        text, hidden_ND = list(prompt), self._prefill(prompt)
        text.append(int(self.main.logits(self.main.batch.n_tokens - 1).argmax()))
        histogram = [0] * (self.num_drafts + 1)
        while len(text) < len(prompt) + num_tokens:
            drafts = self._draft(text, hidden_ND)
            position, window = len(text) - 1, [text[-1], *drafts]
            self.main.prepare(range(position, position + len(window)), [0] * len(window), [True] * len(window))
            self.main.feed(window)
            choices = [int(self.main.logits(place).argmax()) for place in range(len(window))]
            kept = 1
            while kept < len(window) and window[kept] == choices[kept - 1]:
                kept += 1
            text += choices[:kept]
            histogram[kept - 1] += 1
            if self.num_drafts:
                self.main.truncate(0, position + kept)
                hidden_ND = np.concatenate((hidden_ND, self._hidden(kept)))[-max(1, 2 * self.num_drafts) :]
        return text[len(prompt) : len(prompt) + num_tokens], DraftStats(tuple(histogram))

    def close(self) -> None:
        if self.heads is not None:
            self.heads.close()
        self.main.close()

    def _prefill(self, prompt: Sequence[int]) -> Floats:
        """Fill all caches; the hidden states of the last positions."""
        self.main.clear()
        if self.heads is None:
            self.main.prefill(0, prompt)
            return np.zeros((0, self.main.model.hidden_size), np.float32)
        pieces: list[Floats] = []
        for start in range(0, len(prompt), self.main.MAX_FEED):
            chunk = prompt[start : start + self.main.MAX_FEED]
            self.main.prepare(range(start, start + len(chunk)), [0] * len(chunk), [False] * (len(chunk) - 1) + [True])
            self.main.feed(chunk)
            pieces.append(self._hidden(len(chunk)))
        hidden_ND = np.concatenate(pieces)
        self.heads.clear()
        for head in range(self.num_drafts):
            shifted = [*prompt[head + 1 :], *prompt[: head + 1]]  # the last entries are replaced before they count
            self.heads.feed_head(head, shifted, hidden_ND, 0)
        return hidden_ND[-max(1, 2 * self.num_drafts) :]

    def _draft(self, text: Sequence[int], hidden_WD: Floats) -> list[int]:
        """The heads' greedy proposals for the tokens after `text`, whose last token has not been fed."""
        drafts: list[int] = []
        start = len(text) - 1 - len(hidden_WD)
        for head in range(self.num_drafts):
            assert self.heads is not None
            tokens = [*text[start + 1 + head :], *drafts]
            self.heads.feed_head(head, tokens, hidden_WD, start)
            drafts.append(int(self.heads.logits(len(tokens) - 1).argmax()))
        return drafts

    def _hidden(self, count: int) -> Floats:
        """The states before the final norm of the first tokens of the last feed. Shape (count, D)."""
        pointer = self.extension.llama_get_embeddings_nextn(self.main.handle)
        return np.ctypeslib.as_array(pointer, shape=(count, self.main.model.hidden_size)).copy()
