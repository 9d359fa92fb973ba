"""A runner of a few lines whose logits are a hash of exactly what the caches hold, so that any mix-up changes the text.

Pages and rings hold token ids in place of keys. The logits after position p hash all tokens 0..p read through the page
table and the last WINDOW tokens read through the row's ring; hidden states are running hashes with their positions.
Heads remember which id they were given at which position. `next_logits` is the same function of a plain list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from openmimo.config.model import AttentionKind, ModelConfig, MoEConfig, preset
from openmimo.engine.runner import PAGE_TOKENS, Int32, RowState, StepInput, StepOutput

WINDOW, HEADS, SPARSE, TOP_K = 11, 3, 2, 2
RING = WINDOW - 1 + 2 * HEADS
EMPTY = -(10**6)

U64 = np.uint64
_weights = np.random.default_rng(0).integers(1, 2**63, size=(2, 4096), dtype=np.uint64) | U64(1)


def fake_config(vocab_size: int = 23, max_positions: int = 2048) -> ModelConfig:
    nano = preset("nano")
    sliding = dataclasses.replace(nano.sliding_attention, window_keys=WINDOW)
    kinds = (AttentionKind.GLOBAL, AttentionKind.SLIDING, AttentionKind.SLIDING)
    return nano.replace(
        vocab_size=vocab_size,
        layer_kinds=kinds,
        layer_is_moe=(False, True, True),
        moe=MoEConfig(num_experts=8, num_experts_per_token=TOP_K, expert_dim=8),
        sliding_attention=sliding,
        max_positions=max_positions,
    )


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> U64(29))) * U64(0xBF58476D1CE4E5B9)
    return x ^ (x >> U64(32))


def _logits(whole_M: np.ndarray, window_M: np.ndarray, vocab_size: int) -> np.ndarray:
    key_M = mix(whole_M ^ mix(window_M))
    bits_MV = mix(key_M[:, None] + np.arange(vocab_size, dtype=U64) * U64(0x9E3779B97F4A7C15)) >> U64(44)
    return (bits_MV.astype(np.float32) / np.float32(2**20) * 6).astype(np.float32)


def _routes(window_N: np.ndarray) -> np.ndarray:
    places = np.arange(SPARSE * TOP_K, dtype=U64)
    return (mix(window_N[:, None] + places) % U64(8)).astype(np.uint8).reshape(-1, SPARSE, TOP_K)


def _window_sum(tokens: np.ndarray, positions: np.ndarray) -> np.uint64:
    return ((tokens.astype(U64) + U64(1)) * _weights[1][positions]).sum(dtype=U64)


def plain_hashes(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The two hashes after every token of a plain list."""
    tokens = np.array(ids, dtype=U64)
    whole_N = ((tokens + U64(1)) * _weights[0][: len(ids)]).cumsum(dtype=U64)
    starts = [max(0, p - WINDOW + 1) for p in range(len(ids))]
    window = [_window_sum(tokens[s : p + 1], np.arange(s, p + 1)) for p, s in enumerate(starts)]
    return whole_N, np.array(window, dtype=U64)


def next_logits(ids: Sequence[int], vocab_size: int = 23) -> np.ndarray:
    """The oracle: logits after the last token of a plain list."""
    whole_N, window_N = plain_hashes(ids)
    return _logits(whole_N[-1:], window_N[-1:], vocab_size)[0]


def plain_text(prompt: Sequence[int], num_tokens: int, vocab_size: int = 23) -> tuple[int, ...]:
    """Greedy continuation of a prompt by the oracle."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(next_logits(ids, vocab_size).argmax()))
    return tuple(ids[len(prompt) :])


def plain_routes(ids: Sequence[int]) -> np.ndarray:
    return _routes(plain_hashes(ids)[1])


class FakeRunner:
    """See above. `hit_share` of the drafts are the oracle's token, decided by a hash of the place."""

    def __init__(
        self,
        *,
        num_rows: int = 4,
        num_pages: int = 40,
        max_step_tokens: int = 64,
        vocab_size: int = 23,
        hit_share: float = 0.7,
        checks_heads: bool = False,
    ) -> None:
        self.config = fake_config(vocab_size)
        self.num_rows, self.num_pages, self.max_step_tokens = num_rows, num_pages, max_step_tokens
        self.row_bytes, self.page_bytes = 1000, 700
        self.cache_bytes = num_rows * 1000 + num_pages * 700
        self.hit_share, self.checks_heads = hit_share, checks_heads
        self.pages = np.full((num_pages, PAGE_TOKENS), EMPTY, np.int64)
        self.rings = np.full((num_rows, RING), EMPTY, np.int64)
        self.history = np.zeros((num_rows, 2 * HEADS, 2), U64)  # position, running hash
        self.head_ids = np.full((num_rows, HEADS, 2 * RING), EMPTY, np.int64)
        self.last: dict[int, tuple[int, np.ndarray]] = {}
        self.num_forwards = 0

    def load_weights(self, model: object) -> None:
        """A fake has no weights."""

    def forward(self, step: StepInput) -> StepOutput:
        assert 0 < len(step.token_ids_N) == step.counts_S.sum() <= self.max_step_tokens
        assert len(set(step.rows_S.tolist())) == len(step.rows_S), "a row twice in a step"
        self.num_forwards += 1
        self.last, offset, wholes, windows = {}, 0, [], []
        for row, start, count, table in zip(step.rows_S, step.starts_S, step.counts_S, step.page_tables, strict=True):
            tokens = step.token_ids_N[offset : offset + count].astype(np.int64)
            offset += count
            whole, window = self._feed(int(row), int(start), tokens, table)
            self.last[int(row)] = (int(start), whole)
            wholes.append(whole)
            windows.append(window)
        whole_N, window_N = np.concatenate(wholes), np.concatenate(windows)
        wanted = step.logits_M
        assert (np.diff(wanted) > 0).all()
        return StepOutput(
            logits_MV=_logits(whole_N[wanted], window_N[wanted], self.config.vocab_size),
            routed_experts_NLk=_routes(window_N),
        )

    def _feed(self, row: int, start: int, tokens: np.ndarray, table: Int32) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, start + len(tokens))
        self.pages[table[positions // PAGE_TOKENS], positions % PAGE_TOKENS] = tokens
        text = self.pages[
            table[np.arange(positions[-1] + 1) // PAGE_TOKENS], np.arange(positions[-1] + 1) % PAGE_TOKENS
        ]
        whole = ((text.astype(U64) + U64(1)) * _weights[0][: len(text)]).cumsum(dtype=U64)[start:]
        windows = []
        for position in positions:
            seen = np.arange(max(0, position - WINDOW + 1), position + 1)
            old = self.rings[row, seen[seen < start] % RING]
            windows.append(_window_sum(np.concatenate((old, tokens[seen[seen >= start] - start])), seen))
        self.rings[row, positions[-RING:] % RING] = tokens[-RING:]
        return whole, np.array(windows, dtype=U64)

    def prefill_heads(self, rows_S: Int32, starts_S: Int32, counts_S: Int32, next_ids: tuple[Int32, ...]) -> None:
        for row, start, count, ids in zip(rows_S.tolist(), starts_S.tolist(), counts_S.tolist(), next_ids, strict=True):
            fed_start, whole = self.last[row]
            assert fed_start - 2 * HEADS <= start <= fed_start
            assert start + count == fed_start + len(whole)
            for position in range(start, fed_start):
                self._hidden(row, position)
            for head in range(HEADS):
                for place in range(min(count, len(ids) - head)):
                    self.head_ids[row, head, (start + place) % (2 * RING)] = ids[place + head]

    def commit(self, rows_S: Int32, kept_S: Int32) -> None:
        for row, kept in zip(rows_S.tolist(), kept_S.tolist(), strict=True):
            start, whole = self.last[row]
            assert 0 < kept <= len(whole)
            for position in range(start, start + kept):
                self.history[row, position % (2 * HEADS)] = position, whole[position - start]

    def draft(self, rows_S: Int32, lengths_S: Int32, tokens_SW: Int32) -> Int32:
        assert tokens_SW.shape == (len(rows_S), 2 * HEADS)
        drafts = np.zeros((len(rows_S), HEADS), np.int32)
        for place, (row, length) in enumerate(zip(rows_S.tolist(), lengths_S.tolist(), strict=True)):
            text = tokens_SW[place].tolist()
            for position in range(max(0, length - 2 * HEADS), length):
                self._hidden(row, position)
            drafts[place] = self._guess(row, length, text[-1])
            text += drafts[place].tolist()
            for head in range(HEADS):
                if self.checks_heads:
                    self._check_head(row, head, length)
                for position in range(max(0, length - 2 * HEADS), length):
                    next_id = text[position + 1 + head - (length - 2 * HEADS + 1)]
                    self.head_ids[row, head, position % (2 * RING)] = next_id
        return drafts

    def copy_page(self, source: int, target: int) -> None:
        self.pages[target] = self.pages[source]

    def copy_row(self, source: int, target: int) -> None:
        for rows in (self.rings, self.history, self.head_ids):
            rows[target] = rows[source]

    def read_row(self, row: int) -> RowState:
        return RowState((self.rings[row].copy(), self.history[row].copy(), self.head_ids[row].copy()))

    def write_row(self, row: int, state: RowState) -> None:
        self.rings[row], self.history[row], self.head_ids[row] = state.arrays

    def _hidden(self, row: int, position: int) -> np.uint64:
        known, value = self.history[row, position % (2 * HEADS)]
        assert known == position, f"the hidden state at {position} was replaced by that at {known}"
        return value

    @np.errstate(over="ignore")
    def _guess(self, row: int, length: int, newest: int) -> list[int]:
        """The oracle's continuation, some of it spoilt."""
        whole = self._hidden(row, length - 1) if length else U64(0)
        seen = range(max(0, length - WINDOW - HEADS), length)
        text = {position: int(self.rings[row, position % RING]) for position in seen} | {length: newest}
        guesses: list[int] = []
        for position in range(length, length + HEADS):
            whole = whole + U64(text[position] + 1) * _weights[0][position]
            window = np.arange(max(0, position - WINDOW + 1), position + 1)
            sums = _window_sum(np.array([text[int(p)] for p in window]), window)
            token = int(_logits(np.array([whole]), np.array([sums]), self.config.vocab_size)[0].argmax())
            chance = int(mix(np.array([whole + U64(5)]))[0] >> U64(40)) / 2**24
            token = token if chance < self.hit_share else (token + 1) % self.config.vocab_size
            guesses.append(token)
            text[position + 1] = token
        return guesses

    def _check_head(self, row: int, head: int, length: int) -> None:
        """Every position behind the head pass was seen by the head with the text's true id."""
        for position in range(max(0, length - WINDOW), length - 2 * HEADS):
            target = position + 1 + head
            assert self.head_ids[row, head, position % (2 * RING)] == self.rings[row, target % RING], (
                f"head {head} did not see the true id after position {position} of {length}"
            )
