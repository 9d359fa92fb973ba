"""The prefix cache: beginnings of texts whose keys, hidden states and routes need not be computed again.

A sliding layer keeps only its last keys, so a beginning can be taken up only at a length where its rings were copied:
an entry holds references to pages, a snapshot of the row and the routes, all at one exact length.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np

from openmimo.engine.blocks import BlockManager
from openmimo.engine.runner import PAGE_TOKENS, Float32, Routes, RowState

# Shorter beginnings are computed sooner than copied.
MIN_CACHED_TOKENS = 16

Key = tuple[bytes, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixEntry:
    """The state after `length` tokens.

    `logits_V` are those of the next token, where they were computed. `has_heads` says whether the MTP heads ran over
    the text; the last 2K positions of their rings may come from other next tokens and have to be run again.
    """

    length: int
    pages: tuple[int, ...]
    state: RowState
    routes: Routes
    logits_V: Float32 | None
    has_heads: bool

    @property
    def own_bytes(self) -> int:
        """Bytes beside the pages."""
        logits = 0 if self.logits_V is None else self.logits_V.nbytes
        return self.state.num_bytes + self.routes.nbytes + logits


class PrefixCache:
    """Entries by text, the least recently used leaving first when `limit_bytes` is passed or pages are needed.

    A text is known by a digest of its full pages and the ids after them. `num_bytes` counts pages shared between
    entries once.
    """

    def __init__(self, blocks: BlockManager, *, limit_bytes: int) -> None:
        self.blocks = blocks
        self.limit_bytes = limit_bytes
        self.entries: OrderedDict[Key, PrefixEntry] = OrderedDict()
        self.num_bytes = 0
        self._tails: dict[bytes, Counter[int]] = {}
        self._page_entries: Counter[int] = Counter()

    def find(self, ids: list[int], *, needs_heads: bool) -> PrefixEntry | None:
        """The longest entry that `ids` begin with; one of full length must know the next token's logits."""
        digests = _digests(ids)
        for full_pages in range(len(digests) - 1, -1, -1):
            digest, start = digests[full_pages], full_pages * PAGE_TOKENS
            for tail in sorted(self._tails.get(digest, ()), reverse=True):
                if start + tail > len(ids):
                    continue
                key = (digest, tuple(ids[start : start + tail]))
                entry = self.entries.get(key)
                if entry is None or (needs_heads and not entry.has_heads):
                    continue
                if entry.length == len(ids) and entry.logits_V is None:
                    continue
                self.entries.move_to_end(key)
                return entry
        return None

    def has(self, ids: list[int], *, needs_heads: bool, needs_logits: bool) -> bool:
        """Whether exactly this text is known."""
        entry = self.entries.get(_key(ids))
        return entry is not None and entry.has_heads >= needs_heads and (entry.logits_V is not None) >= needs_logits

    def add(self, ids: list[int], entry: PrefixEntry) -> None:
        """Keep an entry and take a hold of its pages; leaves the cache as it is if the entry alone is too large."""
        if entry.own_bytes + len(entry.pages) * self.blocks.page_bytes > self.limit_bytes:
            return
        key = _key(ids)
        if key in self.entries:
            self._remove(key)
        self.blocks.share_pages(entry.pages)
        self.entries[key] = entry
        self._tails.setdefault(key[0], Counter())[len(key[1])] += 1
        self.num_bytes += entry.own_bytes
        for page in entry.pages:
            self._page_entries[page] += 1
            self.num_bytes += self.blocks.page_bytes if self._page_entries[page] == 1 else 0
        while self.num_bytes > self.limit_bytes:
            self.evict()

    def evict(self) -> bool:
        """Drop the least recently used entry; False if there is none."""
        if not self.entries:
            return False
        self._remove(next(iter(self.entries)))
        return True

    def num_evictable_pages(self) -> int:
        """Pages that nobody but the cache holds."""
        return sum(self.blocks.holders[page] == count for page, count in self._page_entries.items())

    def clear(self) -> None:
        """Forget everything, for example because the weights changed."""
        while self.evict():
            pass

    def _remove(self, key: Key) -> None:
        entry = self.entries.pop(key)
        tails = self._tails[key[0]]
        tails[len(key[1])] -= 1
        if tails[len(key[1])] == 0:
            del tails[len(key[1])]
        if not tails:
            del self._tails[key[0]]
        self.num_bytes -= entry.own_bytes
        for page in entry.pages:
            self._page_entries[page] -= 1
            if self._page_entries[page] == 0:
                del self._page_entries[page]
                self.num_bytes -= self.blocks.page_bytes
        self.blocks.give_pages(entry.pages)


def _digests(ids: list[int]) -> list[bytes]:
    """One digest per number of full pages, from 0 on; each covers all tokens before it."""
    digests = [b""]
    for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = np.array(ids[start : start + PAGE_TOKENS], dtype=np.int32).tobytes()
        digests.append(hashlib.blake2b(digests[-1] + page, digest_size=16).digest())
    return digests


def _key(ids: list[int]) -> Key:
    digest = _digests(ids)[-1]
    return digest, tuple(ids[len(ids) // PAGE_TOKENS * PAGE_TOKENS :])
