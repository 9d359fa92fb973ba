"""Drafts of a wanted acceptance: a runner whose proposals come from the text that it is known to write.

A draft is a proposal, so where it comes from changes no text. Wrapping the runner leaves the engine and the costs as
they are: the real heads still run, only what they say is replaced.

Suffixes as in `engine.runner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from openmimo.config.model import ModelConfig
from openmimo.engine import RowState, Runner, StepInput, StepOutput
from openmimo.engine.runner import Int32
from openmimo.errors import RequestError

if TYPE_CHECKING:
    from openmimo.model import MiMoModel

# Multiples of the first, modulo 1, fall evenly whatever their number: means come out as wanted after few steps. The
# second sets rows apart.
GOLDEN, APART = 0.6180339887498949, 0.4142135623730950


def head_acceptance(acceptance_length: float, num_heads: int) -> float:
    """The probability p with which every head is right after the ones before: 1 + p + p^2 + ... = acceptance_length.

    Raises: RequestError outside of 1 to 1 + heads.
    """
    if not 1.0 <= acceptance_length <= 1.0 + num_heads:
        raise RequestError(f"acceptance length {acceptance_length} must be from 1 to 1 + {num_heads} heads")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(middle**n for n in range(num_heads + 1)) < acceptance_length
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


class ReplayRunner:
    """A runner with other drafts: `begin` says for which texts, and how long drafts are kept on average.

    `head_share` None leaves the heads' own proposals. Every sequence must start at its first token (no prefix cache).
    A wrong proposal is the right token plus 1: no likely one, so that it touches experts that the text does not.
    """

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.head_share: float | None = None
        self._texts: list[list[int]] = []
        self._text_of_row: dict[int, list[int]] = {}
        self._draws_of_row: dict[int, int] = {}

    def begin(self, texts: Sequence[Sequence[int]], head_share: float | None) -> None:
        """Draft for these texts, prompts included, from now on; texts must reach K tokens beyond what is written."""
        self._texts, self.head_share = [list(text) for text in texts], head_share
        self._text_of_row.clear()
        self._draws_of_row.clear()

    @property
    def config(self) -> ModelConfig:
        return self.inner.config

    @property
    def num_rows(self) -> int:
        return self.inner.num_rows

    @property
    def num_pages(self) -> int:
        return self.inner.num_pages

    @property
    def max_step_tokens(self) -> int:
        return self.inner.max_step_tokens

    @property
    def row_bytes(self) -> int:
        return self.inner.row_bytes

    @property
    def page_bytes(self) -> int:
        return self.inner.page_bytes

    @property
    def cache_bytes(self) -> int:
        return self.inner.cache_bytes

    def load_weights(self, model: MiMoModel) -> None:
        self.inner.load_weights(model)

    def forward(self, step: StepInput) -> StepOutput:
        if self.head_share is not None and not step.starts_S.all():
            self._recognise(step)
        return self.inner.forward(step)

    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        self.inner.prefill_heads(rows_S, starts_S, counts_S, next_ids)

    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        self.inner.commit(rows_S, kept_S)

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        drafts_SK = self.inner.draft(rows_S, lengths_S, tokens_SW)
        if self.head_share is None:
            return drafts_SK
        num_heads, vocab_size = drafts_SK.shape[1], self.config.vocab_size
        for place, (row, length) in enumerate(zip(rows_S.tolist(), lengths_S.tolist(), strict=True)):
            right = self._text_of_row[row][length + 1 : length + 1 + num_heads]
            num_right = self._draw(row, num_heads)
            wrong = [(token + 1) % vocab_size for token in right[num_right:]]
            drafts_SK[place, : len(right)] = right[:num_right] + wrong
        return drafts_SK

    def copy_page(self, source: int, target: int) -> None:
        self.inner.copy_page(source, target)

    def copy_row(self, source: int, target: int) -> None:
        self.inner.copy_row(source, target)

    def read_row(self, row: int) -> RowState:
        return self.inner.read_row(row)

    def write_row(self, row: int, state: RowState) -> None:
        self.inner.write_row(row, state)

    def _recognise(self, step: StepInput) -> None:
        """Rows of this step's new sequences, by the tokens they begin with; equal beginnings have equal texts."""
        ends_S = np.cumsum(step.counts_S)
        for row, start, count, end in zip(step.rows_S, step.starts_S, step.counts_S, ends_S, strict=True):
            if start == 0:
                begin = step.token_ids_N[end - count : end].tolist()
                self._text_of_row[int(row)] = next(text for text in self._texts if text[: len(begin)] == begin)

    def _draw(self, row: int, num_heads: int) -> int:
        """How many of a step's drafts are right: each head with the same probability, as long as all before were."""
        assert self.head_share is not None
        count = self._draws_of_row[row] = self._draws_of_row.get(row, 0) + 1
        number = (count * GOLDEN + row * APART) % 1.0
        num_right = 0
        while num_right < num_heads and number < self.head_share ** (num_right + 1):
            num_right += 1
        return num_right
