"""Who holds which rows and pages of a runner's cache.

A row belongs to one sequence. A page may be held by several sequences and by the prefix cache; whoever wants to write
into a shared page first takes a copy.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

import numpy as np

from openmimo.engine.runner import PAGE_TOKENS, Int32


class BlockManager:
    """Free rows and pages, and how many hold each page.

    The lowest free page goes first: memory is touched late, and a prompt's pages mostly lie side by side, which a step
    reads up to twice as fast as scattered ones.
    """

    def __init__(self, *, num_rows: int, num_pages: int, row_bytes: int, page_bytes: int) -> None:
        self.num_rows, self.num_pages = num_rows, num_pages
        self.row_bytes, self.page_bytes = row_bytes, page_bytes
        self.free_rows = list(range(num_rows - 1, -1, -1))
        self.free_pages = list(range(num_pages))  # a heap
        self.holders = [0] * num_pages

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows and pages that someone holds; a shared page counts once."""
        rows, pages = self.num_rows - len(self.free_rows), self.num_pages - len(self.free_pages)
        return rows * self.row_bytes + pages * self.page_bytes

    def take_row(self) -> int:
        return self.free_rows.pop()

    def give_row(self, row: int) -> None:
        assert row not in self.free_rows, f"row {row} was given back twice"
        self.free_rows.append(row)

    def take_page(self) -> int:
        page = heapq.heappop(self.free_pages)
        self.holders[page] = 1
        return page

    def share_pages(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free and cannot be shared"
            self.holders[page] += 1

    def give_pages(self, pages: Iterable[int]) -> None:
        """One holder less for each page; the last one frees it."""
        for page in pages:
            assert self.holders[page] > 0, f"page {page} was given back twice"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                heapq.heappush(self.free_pages, page)


class PageTable:
    """The pages of one sequence in the order of its positions; `ids` has spare places behind the first `count`."""

    __slots__ = ("blocks", "count", "ids")

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.ids: Int32 = np.zeros(8, dtype=np.int32)
        self.count = 0

    @property
    def pages(self) -> list[int]:
        return self.ids[: self.count].tolist()

    def adopt(self, pages: Iterable[int]) -> None:
        """Hold pages that others hold too; the table must be empty."""
        assert self.count == 0
        shared = list(pages)
        self.blocks.share_pages(shared)
        self._append(shared)

    def pages_missing(self, num_tokens: int) -> int:
        return max(0, -(-num_tokens // PAGE_TOKENS) - self.count)

    def grow(self, num_tokens: int) -> bool:
        """Take pages until `num_tokens` positions fit; takes none and says False if there are too few."""
        missing = self.pages_missing(num_tokens)
        if missing > len(self.blocks.free_pages):
            return False
        if missing:
            self._append([self.blocks.take_page() for _ in range(missing)])
        return True

    def is_shared(self, position: int) -> bool:
        """Whether someone else holds the page of this position too. False if the table has no such page."""
        place = position // PAGE_TOKENS
        return place < self.count and self.blocks.holders[self.ids[place]] > 1

    def make_own(self, position: int, copy_page: Callable[[int, int], None]) -> None:
        """Replace the shared page of this position by a copy. A page must be free."""
        place = position // PAGE_TOKENS
        source, target = int(self.ids[place]), self.blocks.take_page()
        copy_page(source, target)
        self.ids[place] = target
        self.blocks.give_pages([source])

    def release(self) -> None:
        """Give all pages back."""
        self.blocks.give_pages(self.pages)
        self.count = 0

    def _append(self, pages: list[int]) -> None:
        end = self.count + len(pages)
        if end > len(self.ids):
            self.ids = np.concatenate((self.ids, np.zeros(max(end, len(self.ids)), dtype=np.int32)))
        self.ids[self.count : end] = pages
        self.count = end
