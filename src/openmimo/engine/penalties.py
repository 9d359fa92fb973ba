"""Changes of logits that depend on the text: penalties on tokens that occurred, and fixed biases."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from openmimo.engine.request import SamplingParams
from openmimo.engine.runner import Float32


class LogitAdjuster:
    """One answer's penalties and bias. It counts distinct tokens, so its cost grows with the text, not the vocabulary.

    Raises: nothing; ids in `logit_bias` beyond the vocabulary are refused with the request.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self.params = params
        self.bias_ids = np.array(list(params.logit_bias), dtype=np.int64)
        self.biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        seen = list(dict.fromkeys(prompt_ids)) if params.penalized else []
        self.places = {token: place for place, token in enumerate(seen)}
        self.ids = np.array(seen, dtype=np.int64)
        self.counts = np.zeros(len(seen), dtype=np.float32)
        self.size = len(seen)

    def add(self, token: int) -> None:
        """One more occurrence in the answer."""
        if not self.params.penalized:
            return
        place = self.places.get(token)
        if place is None:
            place = self.places[token] = self.size
            if self.size == len(self.ids):
                self.ids = np.concatenate((self.ids, np.zeros(self.size + 8, dtype=np.int64)))
                self.counts = np.concatenate((self.counts, np.zeros(self.size + 8, dtype=np.float32)))
            self.ids[place], self.counts[place] = token, 0.0
            self.size += 1
        self.counts[place] += 1.0

    def apply_window(self, logits_TV: Float32, drafts: list[int]) -> None:
        """Change the logits after the newest token and after each draft, in place.

        Row t assumes the first t drafts.
        """
        known = self.size, self.counts[: self.size].copy()
        for row, logits_V in enumerate(logits_TV):
            if row:
                self.add(drafts[row - 1])
            self.apply(logits_V)
        for token in [token for token in drafts if self.places.get(token, -1) >= known[0]]:
            self.places.pop(token, None)
        self.size = known[0]
        self.counts[: self.size] = known[1]

    def apply(self, logits_V: Float32) -> None:
        """Repetition first, then frequency and presence, then the bias."""
        params = self.params
        if params.penalized and self.size:
            ids, counts = self.ids[: self.size], self.counts[: self.size]
            values = logits_V[ids]
            factor = np.float32(params.repetition_penalty)
            values = np.where(values > 0, values / factor, values * factor)
            values -= np.float32(params.frequency_penalty) * counts
            values -= np.float32(params.presence_penalty) * (counts > 0)
            logits_V[ids] = values
        if len(self.bias_ids):
            logits_V[self.bias_ids] += self.biases
